"""The report as a page: what it shows, what it needs, and that no content breaks it."""

import copy
import math
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from hf_orthograd.evaluation import MembershipInference, Quality, UnlearningReport
from hf_orthograd.evaluation.reporting import Check, HardestHit, RelearningPoint
from hf_orthograd.evaluation.reporting.figures import draw_report, smooth


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its ids, the addresses it asks for, and all of its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.addresses, self.classes, self.text = Counter(), Counter(), [], Counter(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags[tag] += 1
        self.ids[values.get("id")] += 1
        self.classes.update((values.get("class") or "").split())
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if values.get(name)]

    def handle_data(self, data):
        self.text += data + "\n"


def quality(value, **groups):
    return Quality(loss=1 - value, size=20, value=value, interval=(value / 2, value), groups=groups, worst_group="ann")


@pytest.fixture
def report():
    sets = ("forget", "retain", "test")
    models = {
        model: {name: quality(value, ann=value, bob=value / 2) for name in sets}
        for model, value in (("unlearned", 0.5), ("original", 0.9), ("reference", 0.6))
    }
    draw = np.random.default_rng(0)
    return UnlearningReport(
        goal="retrained",
        metric="accuracy",
        greater_is_better=True,
        models=models | {"unlearned, int8": {"forget": quality(0.4)}},
        hardest_hit={"test": HardestHit("ann", 0.9, 0.5), "retain": HardestHit("bob", 0.4, 0.5)},
        membership={"unlearned": {"test": MembershipInference(0.6, 0.1, 20, 20)}},
        relearning={
            "relearning": {name: [RelearningPoint(0, 1.0, 0.1), RelearningPoint(5, 0.5, 0.4)] for name in models}
        },
        checks=[
            Check("forget accuracy", "equal to the reference's", 0.5, 0.6, 0.05, False, before=0.9),
            Check("<script>alert(1)</script>", "no worse", 0.5, 0.4, 0.05, True),
            Check("MIA AUC", "equal", None, None, 0.05, None),
        ],
        cost={"unlearning": {"seconds": 3.0, "peak_memory_gib": None}},
        settings={"retain_samples_per_step": 8, "samples_at_hand": None, "ended": "all steps were made"},
        history=[{"step": step, "forget_loss": float(step), "retain_loss": 1.0} for step in range(20)],
        losses={model: {name: list(draw.random(20)) for name in sets} for model in models},
        made="2026-11-26, hf_orthograd 0.2.0",
    )


def test_page_says_what_holds_and_needs_no_network(report):
    page = Page(report.to_html())
    assert page.tags["svg"] == page.tags["figcaption"] == len(draw_report(report)) == 5
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert all(address.startswith("#") for address in page.addresses)
    assert max(count for name, count in page.ids.items() if name is not None) == 1
    assert (page.classes["yes"], page.classes["no"], page.classes["unknown"], page.classes["owner"]) == (1, 1, 1, 1)
    assert "does not hold" in page.text and "not measured" in page.text and "alert(1)" in page.text
    assert "2026-11-26, hf_orthograd 0.2.0." in page.text and page.text.count("20 samples") == 3
    assert "0.5 against 0.6" in page.text and "Before: 0.9." in page.text
    assert "The group of test that became worse by most: ann, from 0.900 to 0.500." in page.text
    assert "The group of retain" not in page.text  # it became better
    assert "retain samples per step 8 samples at hand not measured ended all steps were made" in " ".join(
        page.text.split()
    )
    # colours are the page's, so that they follow light and dark
    drawn = report.to_html().split("<svg", 1)[1]
    assert "var(--blue)" in drawn and "#0072b2" not in drawn and "#000000" not in drawn


def test_page_for_others_names_no_group(report):
    page = Page(report.public().to_html())
    assert page.classes["owner"] == 0 and page.tags["svg"] == 2  # relearning and cost
    assert not {"ann", "bob"} & set(page.text.replace(",", " ").replace(".", " ").split())


def test_a_run_that_diverged_still_has_its_page(report):
    for sets in report.losses.values():
        for name in sets:
            sets[name] = [math.nan, math.inf] * 10
    assert "losses" not in draw_report(report)
    report.losses["unlearned"]["forget"][0] = 1.0
    assert "losses" in draw_report(report) and "Unlearning report" in report.to_html()
    report.losses = {"unlearned": {}}
    assert "losses" not in draw_report(report)


@pytest.mark.parametrize("name", ["$\\frac{$", "<b>&", "a" * 80])
def test_any_name_of_a_group_or_an_attack_is_shown_as_it_is(report, name, tmp_path):
    for sets in report.models.values():
        for one in sets.values():
            one.groups = {name: 0.5, "bob": 0.4} if one.groups else None
            one.worst_group = name
    report.relearning = {name: report.relearning["relearning"]}
    report.save(tmp_path)
    assert name[:20] in Page((tmp_path / "unlearning_report.html").read_text()).text


def test_groups_that_one_model_lacks_and_reports_with_little_in_them(report):
    report.models["reference"]["test"].groups, report.models["reference"]["test"].worst_group = {"cid": 0.1}, "cid"
    assert "groups" not in draw_report(report)
    little = UnlearningReport("erased", None, False, {"unlearned": {"forget": Quality(loss=1.0, size=1)}})
    page = Page(little.to_html())
    assert page.tags["svg"] == 0 and "Not measured." in page.text
    before = copy.deepcopy(report)
    report.to_html()
    assert report == before


def test_smoothing_keeps_what_is_constant_and_averages_what_jumps():
    assert np.allclose(smooth(np.full(40, 2.0)), 2)
    assert np.allclose(smooth([0, 1, 2, 3, 4], window=3), [0.5, 1, 2, 3, 3.5])
    assert np.abs(smooth((-1.0) ** np.arange(100))).max() < 0.2
