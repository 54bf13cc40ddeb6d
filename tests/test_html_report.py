"""The page of `dtnh report`, as a reader of HTML sees it."""

import base64
import html.parser
import io

import pytest
from PIL import Image
from report_runs import results, write_runs

from dtnh_jax._cli import main
from dtnh_jax.finetune.reports import report
from dtnh_jax.finetune.reports.html_report import page, read_run
from dtnh_jax.finetune.runs.folder import write_json

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(html.parser.HTMLParser):
    """Collects tables, pictures and references; fails where tags do not match."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.stack, self.tables, self.attributes = [], [], []
        self.text, self.marked, self.pictures = [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attributes.items()]
        if tag == "img":
            self.pictures.append(attributes)
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            if attributes.get("class") == "best":
                self.marked.append(self.tables[-1][-1])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.stack == []
    return reader


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path)


def test_two_runs_are_compared(runs, tmp_path, capsys):
    output = tmp_path / "page.html"
    arguments = ["report", *map(str, runs), "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(output)
    reader = read(output.read_text(encoding="utf-8"))
    overview, differing, *tables = reader.tables
    header, *rows = overview
    assert header == [
        *(
            "method",
            "run",
            "source",
            "target",
            "accuracy (%)",
            "95% interval",
            "in conflict",
        )
    ]
    name = str(runs[1])
    assert rows[3] == [
        *("l2_sp+dtnh", name, "tiny", "folder:<b>photos</b>"),
        *("82.0", "77.0 to 87.0", "61%"),
    ]
    assert [row[0:2] for row in reader.marked] == [["l2_sp+dtnh", name]]
    assert differing[0] == ["option", str(runs[0]), name]
    assert {row[0]: row[1:] for row in differing[1:]} == {
        "--steps": ["None", "99"],
        "--scope": ["global", "leaf"],
    }
    # Then, for each run, the table of its report and all its options.
    for (table, options), accuracy in zip((tables[:2], tables[2:]), (0.7, 0.8)):
        assert table[0][:3] == ["method", "strength", "accuracy"]
        assert f"{100 * accuracy:.1f} ± 1.0" in table[1]
        assert ["scope", "leaf" if accuracy == 0.8 else "global"] in options
    text = "".join(reader.text)
    assert "CC & co" in text
    assert "Mean and standard deviation over 2 seeds" in text


def test_pictures_are_in_the_page_and_nothing_is_fetched(runs):
    reader = read(page([read_run(folder) for folder in runs]))
    kept = []
    for attributes in reader.pictures:
        kind, encoded = attributes["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert attributes["alt"] == "Accuracy by method"
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            kept.append(image.convert("RGB").getpixel((0, 0)))
    assert kept == [(255, 0, 0), (0, 0, 255)]
    for _, name, value in reader.attributes:
        assert name not in ("href", "srcset", "action") or value.startswith("#")
        assert "//" not in value or name == "src"
    assert not {tag for tag, *_ in reader.attributes} & {"script", "link", "iframe"}


def test_one_run_has_no_comparison(runs):
    reader = read(page([read_run(runs[0])]))
    assert len(reader.tables) == 2
    assert reader.marked == []


def test_the_same_options_are_said_to_be_the_same(runs):
    text = "".join(read(page([read_run(runs[0])] * 2)).text)
    assert "have the same options" in text


def test_how_strengths_were_chosen(runs):
    run = read_run(runs[0])
    run.results["tuning"] = [
        {"method": "fine-tuning", "strength": 0.0, "accuracies": [0.5, 0.5]},
        {"method": "l2_sp", "strength": 0.1, "accuracies": [0.5, 0.75]},
        {"method": "l2_sp", "strength": 1.0, "accuracies": [0.25, 0.75]},
    ]
    run.results["strengths"] = {"l2_sp": 0.1}
    reader = read(page([run]))
    assert reader.tables[1][1:] == [
        ["fine-tuning", "", "50.0"],
        ["l2_sp", "0.1", "62.5"],
        ["l2_sp", "1", "50.0"],
    ]
    assert reader.marked == [["l2_sp", "0.1", "62.5"]]


def test_one_seed_has_no_column_of_intervals(runs):
    alone = [read_run(folder) for folder in runs]
    for run in alone:
        for numbers in run.results["methods"].values():
            numbers["accuracy"] |= {"low": None, "high": None}
    header, *rows = read(page(alone)).tables[0]
    assert header[3:] == ["target", "accuracy (%)", "in conflict"]
    assert rows[3][3:] == ["folder:<b>photos</b>", "82.0", "61%"]


def test_what_is_no_run_is_refused(tmp_path, runs, capsys):
    (tmp_path / "matrix").mkdir()
    write_json(tmp_path / "matrix" / "results.json", [1, 2])
    for folder in (tmp_path / "none", tmp_path / "matrix"):
        assert main(["report", str(folder)]) == 2
        err = capsys.readouterr().err
        assert "is not the folder of a complete run" in err
        assert err.count("\n") == 1
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "a" / "b")]) == 2
    assert "can not be written: No such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs run folders, got none"):
        page([])


def test_notes_say_whether_seeds_draw_training_images():
    found = results(0.5)
    assert "Seeds differ in training images, head" in report.notes(found)[0]
    found["draws_training_set"] = False
    said = report.notes(found)[0]
    assert "Seeds differ in head, order and dropout, and share the training im" in said
