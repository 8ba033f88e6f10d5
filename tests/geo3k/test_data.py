"""The loader: what it takes, and how it says what it does not take."""

import datasets
import pytest
from PIL import Image

from benchmarks.geo3k import INSTRUCTION
from benchmarks.geo3k.data import load
from benchmarks.geo3k_nano.dataset import FEATURES
from benchmarks.geo3k_nano.dataset import main as generate
from tests.geo3k import NANO
from vllm_deepstack.cli import UserError

WHITE = Image.new("RGB", (64, 32), "white")


@pytest.fixture
def write(tmp_path):
    """Writes rows as the test split of a data set."""

    def to(rows, features=FEATURES, name="test-00000-of-00001.parquet"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / name)
        return str(tmp_path)

    return to


def row(**changed):
    return {"images": [WHITE], "problem": "<image>Find x.", "answer": "2 \\sqrt { 3 }"} | changed


def test_loads_the_schema_of_geo3k(write):
    (question,) = load(write([row()]), "test")
    assert (question.number, question.problem, question.answer) == (
        0,
        "<image>Find x.",
        "2 \\sqrt { 3 }",
    )
    assert [(image.mode, image.size) for image in question.images] == [("RGB", (64, 32))]


def test_loads_the_shipped_test_split():
    questions = load(str(NANO / "data"), "test")
    assert len(questions) == 600
    assert all(len(question.images) == 1 for question in questions)


def test_loads_what_the_generator_writes(tmp_path):
    generate([str(tmp_path), "--train", "3", "--validation", "2", "--test", "0"])
    assert [len(load(str(tmp_path), split)) for split in ("train", "validation")] == [3, 2]
    with pytest.raises(UserError, match="has train, validation"):
        load(str(tmp_path), "test")


def test_the_first_questions_alone():
    assert [question.number for question in load(str(NANO / "data"), "test", 3)] == [0, 1, 2]


def test_a_split_in_several_files(write):
    write([row(answer="1")], name="test-00000-of-00002.parquet")
    folder = write([row(answer="2")], name="test-00001-of-00002.parquet")
    assert [question.answer for question in load(folder, "test")] == ["1", "2"]


def test_images_stand_where_their_marks_are(write):
    folder = write([row(images=[WHITE, WHITE], problem="See <image> and <image>.")])
    (question,) = load(folder, "test")
    assert question.content(["a.png", "b.png"]) == [
        {"type": "text", "text": "See "},
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": " and "},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "."},
        {"type": "text", "text": f" {INSTRUCTION}"},
    ]


def test_a_missing_column(write):
    rows = [{"images": [WHITE], "question": "<image>", "answer": "1"}]
    features = datasets.Features(
        {
            "images": FEATURES["images"],
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    with pytest.raises(UserError, match=r"'problem' is missing .* has images, question, answer"):
        load(write(rows, features), "test")


def test_a_column_of_another_kind(write):
    features = datasets.Features(FEATURES | {"images": datasets.Value("string")})
    with pytest.raises(UserError, match=r"'images' holds Value.*, not lists of images"):
        load(write([row(images="a.png")], features), "test")


def test_a_corrupt_image(write, tmp_path):
    folder = write([row(), row(images=[{"bytes": b"\x89PNG\r\n", "path": None}])])
    with pytest.raises(UserError, match="test split, question 1: an image cannot be read"):
        load(folder, "test")


def test_as_many_marks_as_images(write):
    with pytest.raises(UserError, match="question 0: 0 <image> marks, 1 images"):
        load(write([row(problem="Find x.")]), "test")


def test_a_missing_split(write):
    with pytest.raises(UserError, match=r"--split train: .* has test"):
        load(write([row()]), "train")


@pytest.mark.parametrize("dataset", ["./nowhere", "{folder}"])
def test_a_folder_without_parquet_files(dataset, tmp_path):
    with pytest.raises(UserError, match="no parquet files"):
        load(dataset.format(folder=tmp_path), "test")


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "test.parquet").write_text("nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path), "test")


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"geometry3k cannot be loaded.*give --dataset a folder"):
        load("hiyouga/geometry3k", "test")
