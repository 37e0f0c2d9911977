"""Which parts of a recogniser are trained to unlearn, as the speech example is told."""

import copy

from peft import LoraConfig, get_peft_model


def check_parts(model, arguments) -> None:
    """Checks that the model has the parts that the arguments name."""
    if arguments.freeze_decoder and not model.config.is_encoder_decoder:
        raise ValueError(f"`--freeze_decoder` is set, but {type(model).__name__} has no decoder. Leave it out.")
    if (count := arguments.trained_encoder_layers) is not None:
        layers = len(getattr(model.get_encoder(), "layers", ())) if model.config.is_encoder_decoder else 0
        if not 1 <= count <= layers:
            raise ValueError(
                f"`--trained_encoder_layers` is {count}, but {type(model).__name__} has an encoder of {layers} layers below a decoder. "
                "Give at least 1 and no more than that, or leave it out."
            )


def make_student(model, arguments):
    """A copy to unlearn, its decoder frozen and its attention projections wrapped in a LoRA adapter if that was asked for."""
    student, rank = copy.deepcopy(model), arguments.lora_rank
    adapted = ""
    if arguments.freeze_decoder or arguments.trained_encoder_layers is not None:
        student.get_decoder().requires_grad_(False)  # and with it the tied output layer
        adapted = r"encoder\."
    if (count := arguments.trained_encoder_layers) is not None:
        encoder = student.get_encoder()
        encoder.layers[count:].requires_grad_(False)
        encoder.layer_norm.requires_grad_(False)  # behind the last
        adapted = rf"encoder\.layers\.({'|'.join(map(str, range(count)))})\."
    targets = rf".*\.{adapted}(.*\.)?(q_proj|k_proj|v_proj|out_proj)"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return get_peft_model(student, config) if arguments.use_lora else student
