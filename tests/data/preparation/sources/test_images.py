from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dmvae.config.sources import ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import read_source
from dmvae.data.preparation.rows import Rows
from tests.data.preparation.test_rows import collect, read_all


def source_of(folder: Path, table: str) -> ImagesSource:
    (folder / "rows.csv").write_text(table)
    column = {
        "scan": ImageColumn(column="file", size=(2, 3)),
        "grey": ImageColumn(column="file", size=(2, 3), channels=1),
    }
    return ImagesSource(table=str(folder / "rows.csv"), folder=str(folder), modalities=column)


def test_images_are_read_and_absent_files_are_missing(tmp_path: Path) -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rows = read_all(source_of(tmp_path, "id,file,label\nx,a.png,1\ny,gone.png,0\nz,,\n"))
    assert rows.present["scan"].tolist() == [True, False, False]
    assert (rows.data["scan"][0] == pixels.transpose(2, 0, 1)).all()
    assert rows.data["grey"].shape == (3, 1, 2, 3)
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0, -1]


def test_what_does_not_decode_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"Cannot decode image .*a.png: .*rows.csv, line 2"):
        read_all(source_of(tmp_path, "id,file\nx,a.png\n"))
    with pytest.raises(DatasetError, match=r"No file named in column 'file' of .*rows.csv exists in"):
        read_all(source_of(tmp_path, "id,file\nx,b.png\n"))


def test_grey_values_that_are_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 3), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DatasetError, match=r"a.tiff: expected grey values .*, got floats .*line 2"):
        read_all(source_of(tmp_path, "id,file\nx,a.tiff\n"))


def one(folder: Path, image: Image.Image, name: str = "a.png", **settings: Any) -> Any:
    image.save(folder / name, **({"exif": image.getexif()} if name.endswith("jpg") else {}))
    return several(folder, [name], **settings)


def several(folder: Path, names: Sequence[str], **settings: Any) -> tuple[Rows, list[str]]:
    (folder / "rows.csv").write_text("id,file,age,sex\n" + "\n".join(f"{n},{f},{n},f" for n, f in enumerate(names)))
    columns = settings.pop("columns", {})
    column = {"column": "file", "size": (8, 8), **settings}
    source = {"table": f"{folder}/rows.csv", "folder": str(folder), "modalities": {"scan": column, **columns}}
    stream = read_source(ImagesSource.model_validate(source), 0, folder)
    rows = collect(stream)
    return rows, [*stream.notes, *stream.remarks]


def half_red(width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    image = half_red()
    image.getexif()[274] = orientation
    rows, _ = one(tmp_path, image, "a.jpg")
    red = rows.data["scan"][0, 0]
    sides = {"left": red[:, :2], "right": red[:, -2:], "top": red[:2], "bottom": red[-2:]}
    wanted = ["left", "right", "right", "left", "top", "top", "bottom", "bottom"][orientation - 1]
    assert [side for side, pixels in sides.items() if pixels.mean() > 200] == [wanted]


@pytest.mark.parametrize(("largest", "bits"), [(200, 8), (900, 10), (4095, 12), (16000, 14), (65535, 16)])
def test_the_range_of_the_data_fills_8_bits(tmp_path: Path, largest: int, bits: int) -> None:
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    rows, notes = one(tmp_path, Image.fromarray(values), "a.tiff", channels=1)
    assert rows.data["scan"][0, 0].tolist() == (values >> (bits - 8)).tolist()
    assert f"scan: 1 images of more than 8 bits reach {largest}: 0 to {(1 << bits) - 1} became 0 to 255" in notes


def test_all_images_keep_one_scale_and_a_darker_range_is_said(tmp_path: Path) -> None:
    for name, largest in (("a.png", 65535), ("b.png", 4095)):
        Image.fromarray(np.full((8, 8), largest, np.uint16)).save(tmp_path / name)
    rows, notes = several(tmp_path, ["a.png", "b.png"], channels=1)
    assert rows.data["scan"][:, 0, 0, 0].tolist() == [255, 15]
    assert any("b.png reaches only 4095. Set bits if that is its full range" in note for note in notes)
    with pytest.raises(DatasetError, match=r"a.png: expected grey values from 0 to 4095, got 65535"):
        several(tmp_path, ["a.png", "b.png"], bits=12)


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rows, notes = one(tmp_path, clear)
    assert (rows.data["scan"] == 255).all()
    assert "scan: laid 1 transparent images over the colour (255, 255, 255)" in notes
    rows, _ = one(tmp_path, clear, background=(0, 0, 9))
    assert rows.data["scan"][0, :, 0, 0].tolist() == [0, 0, 9]


def test_a_wide_image_is_stretched_cropped_or_padded(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    image = Image.fromarray(pixels)
    (crop, _), (pad, _) = one(tmp_path, image, fit="crop"), one(tmp_path, image, fit="pad")
    assert (crop.data["scan"] == 200).all()
    assert pad.data["scan"][0, 0, 0].tolist() == [255] * 8
    assert one(tmp_path, image)[0].data["scan"][0, 0, 4].tolist()[::7] == [0, 0]


def test_images_that_do_not_decode_are_skipped_and_listed_when_asked(tmp_path: Path) -> None:
    half_red().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    rows, notes = several(tmp_path, ["a.png", "cut.png", "gone.png"], on_error="skip")
    assert rows.present["scan"].tolist() == [True, False, False]
    assert any("skipped 1 images (image" in note and "cut.png" in note and "line 3" in note for note in notes)
    assert any("1 of 3 files are not found, the first 'gone.png' in" in note and "line 4" in note for note in notes)


def test_paths_as_windows_writes_them_are_found(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    half_red().save(tmp_path / "a b" / "x.png")
    rows, _ = several(tmp_path, ["a b\\x.png", "a b/x.png"])
    assert rows.present["scan"].tolist() == [True, True]


def test_folders_of_splits_keep_their_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        half_red().save(tmp_path / split / "x.png")
    rows, notes = several(tmp_path, ["train/x.png", "test\\x.png"])
    assert rows.splits is not None
    assert rows.splits.tolist() == ["train", "test"]
    assert "splits from the names of files: train, test" in notes


def test_columns_of_the_same_table_are_modalities(tmp_path: Path) -> None:
    half_red().save(tmp_path / "x.png")
    columns = {"age": {"columns": "a*"}, "both": {"columns": ["age", "sex"]}}
    rows, notes = several(tmp_path, ["x.png", "x.png"], columns=columns)
    assert rows.data["age"].tolist() == [[0], [1]]
    assert rows.data["both"].shape == (2, 2)
    assert notes == []
    assert several(tmp_path, ["x.png"])[1] == ["not taken: 2 columns (age, sex)"]
