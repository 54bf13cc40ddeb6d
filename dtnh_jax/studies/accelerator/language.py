"""Training steps of the language model, with the KL to a reference model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dtnh_jax import regularizers
from dtnh_jax.regularizers import expected_error
from dtnh_jax.studies.accelerator import llama
from dtnh_jax.studies.accelerator.devices import dtype_of
from dtnh_jax.studies.accelerator.steps import Task

Tokens = Int[Array, "batch tokens"]


def task(
    *,
    dtype: str,
    lora: bool,
    size: llama.Size = llama.Size(),  # noqa: B008  (a tuple)
    batch: int = 4,
    tokens: int = 512,
    rank: int = 8,
) -> Task:
    """Returns the task of full fine-tuning, or of LoRA's factors with frozen weights.

    The step computes the reference's logits: for LoRA from the frozen weights, for full
    fine-tuning from a second set of weights.
    """
    of = dtype_of(dtype)
    base = llama.weights(size, of)

    def outputs(params: Any, data: Any, inputs: Tokens) -> Array:
        if lora:
            return llama.logits(size, data["base"], inputs, params)
        return llama.logits(size, params, inputs)

    def loss(params, aux, data):
        return _next_token_loss(outputs(params, data, data["tokens"]), data), aux

    def objective(params, aux, data):
        ours = outputs(params, data, data["tokens"])
        base = jax.lax.stop_gradient(data["base"])
        reference = llama.logits(size, base, data["tokens"])
        return (_next_token_loss(ours, data), kl(ours, reference)), aux

    def held_out(params, aux, data):
        del aux
        ours = outputs(params, data, data["held-out tokens"])
        return expected_error(ours, data["held-out labels"])

    def data():
        rng = np.random.default_rng(2)
        names = ("tokens", "labels", "held-out tokens", "held-out labels")
        shape, highest = (batch, tokens), size.vocabulary
        made = {n: rng.integers(highest, size=shape, dtype=np.int32) for n in names}
        return {**made, "base": base}

    return Task(
        name=f"Llama 135M, {'LoRA' if lora else 'full'}",
        dtype=dtype,
        penalty="KL",
        params=llama.adapters(size, rank, of) if lora else llama.weights(size, of, 1),
        aux=(),
        make_data=data,
        loss=loss,
        objective=objective,
        held_out=held_out,
        optimizer=optax.adamw(1e-5),
        strength=0.1,
        with_pull=not lora,
    )


def kl(
    logits: Float[Array, "batch tokens V"], reference: Float[Array, "batch tokens V"]
) -> Float[Array, ""]:
    """`KL(reference || model)` in nats per token, mean."""
    if ready := getattr(regularizers, "kl_to_reference", None):
        return ready(logits, reference)
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    theirs = jax.lax.stop_gradient(theirs)
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


def _next_token_loss(logits: Array, data: Any) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
    return jnp.mean(losses)
