"""A contrastive loss in which each pair stands alone."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from ..annotations import NumItems


class FixedNegatives:
    """The contrastive loss of each pair of image and text against others that are held fixed, for CLIP.

    In CLIP's own loss (arXiv 2103.00020) the other pairs of the batch are the negatives: it has no gradient of a single
    sample. Here they are embeddings that do not move, of pairs drawn once:

        loss_i = (-log softmax_j(s <v_i, t_j>)[i] - log softmax_j(s <t_i, v_j>)[i]) / 2,  j over i itself and the fixed ones

    with the model's temperature s, which is not trained: with few negatives it would leave its place.

    Pass it to a trainer as `compute_loss_func`; batches need no labels. As `compute_divergence_func` pass [`divergences`].

    Args:
        image_embeds, text_embeds (`torch.Tensor`): Of the fixed pairs, under the starting model, shape (n, d), each of norm 1.

    Raises:
        ValueError: The shapes differ; or, at its first call, the model's logits have a bias.
    """

    def __init__(self, image_embeds: Tensor, text_embeds: Tensor):
        if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
            raise ValueError(
                f"`image_embeds` and `text_embeds` must both have shape (n, d), but have {tuple(image_embeds.shape)} and "
                f"{tuple(text_embeds.shape)}."
            )
        self._images, self._texts = image_embeds.detach(), text_embeds.detach()
        self._checked = False

    def __call__(
        self, outputs: ModelOutput, labels: Tensor | None = None, num_items_in_batch: NumItems = None
    ) -> Tensor:
        """Losses of shape (B,), in nats."""
        logits = self._logits(outputs)
        own = torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device)
        return torch.stack([F.cross_entropy(side, own, reduction="none") for side in logits]).mean(dim=0)

    def divergences(self, outputs: ModelOutput, start_outputs: ModelOutput, labels: Tensor | None = None) -> Tensor:
        """KL(start || model) over which one belongs to it, the mean of both sides, in nats, shape (B,)."""
        own, start = (self._logits(one).log_softmax(-1) for one in (outputs, start_outputs))
        return F.kl_div(own, start, reduction="none", log_target=True).sum(-1).mean(dim=0)

    def _logits(self, outputs) -> Tensor:
        """Similarity of each sample's sides, image and text, to its own other and to the fixed ones: (2, B, 1 + n)."""
        images, texts = outputs.image_embeds.float(), outputs.text_embeds.float()
        own = (images * texts).sum(dim=1, keepdim=True)
        # the temperature, read off the model's own logits by least squares
        diagonal, cosines = outputs.logits_per_image.diagonal().float().detach(), own.detach()[:, 0]
        scale = (diagonal @ cosines) / (cosines @ cosines)
        if not self._checked:  # once: it waits for the device
            if not (scale > 0 and torch.allclose(scale * cosines, diagonal, rtol=1e-2, atol=1e-2)):
                raise ValueError(
                    "The model's `logits_per_image` are not its temperature times the cosines, as CLIP's are: SigLIP adds a bias. "
                    "Write a `compute_loss_func` for it."
                )
            self._checked = True
        sides = (images, self._texts), (texts, self._images)
        found = [torch.cat([own, side @ others.to(side).T], dim=1) for side, others in sides]
        return scale * torch.stack(found)
