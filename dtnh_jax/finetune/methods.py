"""The methods that are compared: a regularizer, and a rule that resolves conflicts.

A method is called `<regularizer>` where the two gradients are simply added, and
`<regularizer>+<rule>` where a rule resolves their conflicts first. So a pair of those
differs by the rule alone. `<regularizer>+never_hurt` bounds the regularizer's gradient
instead, by a trust that is chosen by cross-validation. `scratch`, `fine-tuning` and
`lora` have no regularizer.
"""

from typing import NamedTuple

from dtnh_jax.finetune.regularizers import REGULARIZERS


class Method(NamedTuple):
    """A way of training: pretrained or not, a regularizer, a rule."""

    name: str
    is_pretrained: bool = True
    regularizer: str | None = None
    rule: str | None = None
    has_adapters: bool = False

    @property
    def never_hurts(self) -> bool:
        """Whether `dtnh_jax.never_hurt` adds the regularizer."""
        return self.rule == NEVER_HURT

    @property
    def plain(self) -> str | None:
        """The same method with the gradients added, if this one has a rule."""
        is_resolved = self.rule is not None and self.rule != ADDED
        return self.regularizer if is_resolved else None

    @property
    def baseline(self) -> str:
        """The same method without a regularizer."""
        return "lora" if self.has_adapters else "fine-tuning"


ADDED, NEVER_HURT = "sum", "never_hurt"
# `never_hurt` gets this multiple of the usual strength, so that only trust matters.
UNLIMITED = 1e4
# A new rule is a name here, and a row in `training.optimizers`.
RULES = (ADDED, "dtnh")


def _regularized(name: str, rule: str) -> Method:
    title = name if rule == ADDED else f"{name}+{rule}"
    return Method(title, True, name, rule, REGULARIZERS[name].has_adapters)


METHODS = {
    method.name: method
    for method in (
        Method("scratch", is_pretrained=False),
        Method("fine-tuning"),
        Method("lora", has_adapters=True),
        *(
            _regularized(name, rule)
            for name in REGULARIZERS
            for rule in (*RULES, NEVER_HURT)
        ),
    )
}
# Default of `--methods`; `all` stands for `METHODS`.
DEFAULT_METHODS = ("fine-tuning", "l2_sp", "l2_sp+dtnh", "l2_sp+never_hurt")
# A hundred times the usual strength: the default run shows the effect of a wrong one.
DEFAULT_STRENGTH = {"l2_sp": 10.0}
