"""The methods that are compared: how a regularizer is added, and at what strengths.

A method is called `<regularizer>` where the gradients are added, and
`<regularizer>+<rule>` where they are taken separately and a rule resolves conflicts.
"""

from typing import Literal, NamedTuple

Gradients = Literal["loss", "sum", "pair"]


class Method(NamedTuple):
    """What is trained, or made of another method's result."""

    name: str
    strengths: tuple[float, ...] = (0.0,)  # by default
    meaning: str = ""  # of a strength, for readers of a report
    regularizer: str | None = None  # of outputs, one of `objectives.OF_OUTPUTS`
    gradients: Gradients = "loss"  # the loss's, that of the sum, or both
    has_held_out: bool = False  # whether gradients of held-out text are of use
    after: str | None = None  # the method whose trained adapters it starts from


LORA, KL, DECAY, WISE_FT = "lora", "kl", "decay", "wise_ft"
DTNH, NEVER_HURT = "dtnh", "never_hurt"


def _of_outputs(name: str) -> tuple[Method, ...]:
    in_sum = "factor of the KL, in nats per token, in the sum"
    of_step = "length of the KL's own step, as a multiple of the loss's"
    of_gradient = "most that the KL's gradient is multiplied by: its trust decides"
    return (
        Method(name, (0.1, 1.0, 10.0, 100.0), in_sum, name, "sum"),
        Method(f"{name}+{DTNH}", (1.0,), of_step, name, "pair"),
        Method(f"{name}+{NEVER_HURT}", (100.0,), of_gradient, name, "pair", True),
    )


METHODS = {
    method.name: method
    for method in (
        Method(LORA),
        *_of_outputs(KL),
        *_of_outputs("masked_kl"),
        Method(
            WISE_FT,
            (0.25, 0.5, 0.75),
            "share of the way back to the base model",
            after=LORA,
        ),
        Method(
            DECAY,
            (10.0,),
            "factor of the pull to the base model, as AdamW's weight decay",
        ),
    )
}
# What is compared unless `--methods` says otherwise; `all` there means `METHODS`.
DEFAULT_METHODS = (LORA, KL, f"{KL}+{DTNH}", f"{KL}+{NEVER_HURT}", WISE_FT, DECAY)
