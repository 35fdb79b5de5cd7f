from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmvae.config.sources import ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from tests.data.preparation.test_rows import read_all


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


def test_of_16_bits_the_upper_8_are_read(tmp_path: Path) -> None:
    values = (np.arange(6).reshape(2, 3) * 13_000).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    rows = read_all(source_of(tmp_path, "id,file\nx,a.png\n"))
    assert rows.data["grey"][0, 0].tolist() == (values >> 8).tolist()
    assert rows.data["scan"][0, 2].tolist() == (values >> 8).tolist()
    Image.fromarray(np.zeros((2, 3), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DatasetError, match=r"a.tiff: expected grey values .*, got floats .*line 2"):
        read_all(source_of(tmp_path, "id,file\nx,a.tiff\n"))
