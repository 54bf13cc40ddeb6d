"""Texts, how they are cut into rows, and which rows are trained and tested on."""

import json

import numpy as np
import pytest
import tiny_language_model as tiny

from dtnh_jax.lm import splits, texts
from dtnh_jax.lm.model_files import ModelFile
from dtnh_jax.lm.packing import Encoded, Stream, encode, pack
from dtnh_jax.lm.texts import Text, TextError

TOKENIZER = tiny.make_tokenizer()
END = TOKENIZER.token_to_id(tiny.END)
MODEL = ModelFile("tiny", "", None, None, TOKENIZER, END)  # type: ignore[arg-type]


def plain(count, *, start=0):
    return Encoded([start + i for i in range(count)], 1, "", True)


def answer(count, learned, *, start=0):
    return Encoded([start + i for i in range(count)], learned, "here", False)


def test_plain_texts_fill_rows_without_a_gap():
    rows = pack([plain(4, start=10), plain(8, start=20), plain(3, start=40)], 5)
    np.testing.assert_array_equal(
        rows.tokens, [[10, 11, 12, 20, 21], [22, 23, 24, 25, 26], [40, 41, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        rows.labels, [[11, 12, 13, 21, 22], [23, 24, 25, 26, 27], [41, 42, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        rows.segments, [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        rows.positions, [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(rows.weights.sum(1), [5, 5, 2])
    assert rows.weights.dtype == np.float32


def test_answers_are_not_cut_and_prompts_are_not_learned():
    rows = pack([answer(4, 2), answer(4, 3, start=10), answer(3, 1, start=20)], 5)
    np.testing.assert_array_equal(rows.tokens, [[0, 1, 2, 0, 0], [10, 11, 12, 20, 21]])
    np.testing.assert_array_equal(rows.weights, [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    with pytest.raises(TextError, match="here has 7 tokens, more than `--context`, 5"):
        pack([answer(7, 2)], 5)


def test_a_text_ends_with_its_token_and_a_prompt_has_the_form_of_the_chat():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    found = encode(
        [Text("the cat"), Text("a dog", "what sat?")], TOKENIZER, END, template
    )
    assert TOKENIZER.decode(found[0].tokens, skip_special_tokens=False) == (
        f"the cat{tiny.END}"
    )
    assert (found[0].learned, found[0].may_be_cut) == (1, True)
    read = found[1].tokens[: found[1].learned]
    assert TOKENIZER.decode(read) == "<user>what sat?<a>"
    assert TOKENIZER.decode(found[1].tokens[found[1].learned :]) == "a dog"
    assert found[1].tokens[-1] == END
    (without,) = encode([Text("a dog", "sat?")], TOKENIZER, END, None)
    assert TOKENIZER.decode(without.tokens[: without.learned]) == "sat?"


def test_batches_are_a_function_of_the_step_and_take_every_row_once_a_pass():
    rows = pack([plain(5, start=10 * i) for i in range(7)], 4)
    stream, again = Stream(rows, 3, seed=1), Stream(rows, 3, seed=1)
    seen = [stream[step].tokens[:, 0].tolist() for step in range(7)]
    firsts = [first for batch in seen for first in batch]
    for number in range(3):
        assert sorted(firsts[7 * number : 7 * number + 7]) == [10 * i for i in range(7)]
    assert firsts[:7] != firsts[7:14]
    assert again[4].tokens[:, 0].tolist() == seen[4]
    assert again[1].tokens[:, 0].tolist() == seen[1]
    others = Stream(rows, 3, seed=2)
    assert [others[step].tokens[:, 0].tolist() for step in range(7)] != seen


def test_no_text_is_in_two_splits(tmp_path):
    own = [Text(text) for text in sorted(set(tiny.texts(120)))]
    target, kept = (texts.Source(name, "", own) for name in ("target", "kept"))
    found = splits.make_splits(MODEL, target, kept, 32, 3)
    assert len(found.test.tokens) == len(found.kept.tokens) == 3
    parts = [
        {
            tuple(row.tokens[row.segments == segment].tolist())
            for row in map(rows.at, range(len(rows.tokens)))
            for segment in np.unique(row.segments)
            if segment and (row.segments == segment).sum() > 12  # not a short rest
        }
        for rows in (found.train, found.held_out, found.test)
    ]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_own_files(tmp_path):
    (tmp_path / "a.md").write_text("\n\n".join(["x" * 600] * 5))
    (tmp_path / "b.txt").write_text("short\n")
    (tmp_path / "c.py").write_text("not prose")
    source = texts.open_source(f"text:{tmp_path}")
    assert [len(text.text) for text in source.texts] == [1202, 1202, 600, 5]
    assert len(texts.open_source(f"text:{tmp_path}/c.py").texts) == 1
    lines = [{"prompt": "a?", "completion": "b"}, {"text": "c", "more": 1}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = texts.open_source(f"text:{path}").texts
    assert [(x.prompt, x.text, x.where) for x in found] == [
        ("a?", "b", f"{path}, line 1"),
        (None, "c", f"{path}, line 3"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be JSON"),
        ('{"prompt": "a"}', 'line 2 must have "prompt" and "completion".*got prompt'),
        ("[1]", "line 2 must have .*, got neither"),
        ('{"text": 1}', "line 2 must hold strings"),
        ('{"prompt": "a", "completion": " "}', "line 2 must have something to learn"),
    ],
)
def test_lines_that_can_not_be_used(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(TextError, match=message):
        texts.open_source(f"text:{path}")


def test_sources_that_can_not_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_FORTUNES", tmp_path)
    with pytest.raises(TextError, match="apt-get install fortunes-de"):
        texts.open_source("fortunes-de")
    with pytest.raises(TextError, match="one of fortunes-de, python-docs, text:PATH"):
        texts.open_source("novels")
    with pytest.raises(TextError, match="can not be read: No such file"):
        texts.open_source(f"text:{tmp_path}/none.txt")
    (tmp_path / "empty.txt").write_text(" \n\n ")
    with pytest.raises(TextError, match=r"empty.txt must hold some text, got none"):
        texts.open_source(f"text:{tmp_path}/empty.txt")
    (tmp_path / "latin.txt").write_bytes("Öl".encode("latin1"))
    with pytest.raises(TextError, match=r"latin.txt must be text in UTF-8"):
        texts.open_source(f"text:{tmp_path}/latin.txt")
    few = texts.Source("few", "", [Text("the cat")])
    with pytest.raises(TextError, match="few has too few texts, 1: none is left for"):
        splits.make_splits(MODEL, few, few, 32, 3)


def test_sayings_are_cut_at_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_FORTUNES", tmp_path)
    (tmp_path / "a.u8").write_text("Ä\n  -- X\n%\nB\n%\n")
    (tmp_path / "asciiart.u8").write_text("/\\\n%\n")
    source = texts.open_source("fortunes-de")
    assert [text.text for text in source.texts] == ["Ä\n  -- X", "B"]


def test_the_language_reference_of_python_is_prose():
    source = texts.open_source("python-docs")
    assert len(source.texts) > 50
    assert sum(len(text.text) for text in source.texts) > 300_000
