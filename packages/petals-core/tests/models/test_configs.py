import shutil
from pathlib import Path
from typing import Any

import pytest

from petals_core.errors import CheckpointError, PetalsError, UnsupportedModelError
from petals_core.models.configs import read_config, read_generation_config
from petals_core.models.sources import Folder
from petals_core.testing.factories import edit_config


@pytest.mark.parametrize(
    ("changes", "message", "error"),
    [
        ({"model_type": None}, "names no model_type", CheckpointError),
        ({"model_type": "nonesuch"}, "is of type nonesuch, which this version", UnsupportedModelError),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}},
            "comes with code of its own .nonesuch., which can do anything",
            UnsupportedModelError,
        ),
        ({"hidden_size": "many"}, "the config of .* can't be read", CheckpointError),
    ],
)
def test_a_broken_config(
    single: Path, tmp_path: Path, changes: dict[str, Any], message: str, error: type[PetalsError]
) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "model"))
    edit_config(folder, **changes)
    with pytest.raises(error, match=message) as raised:
        read_config(folder / "config.json", Folder(folder), trust_remote_code=False)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_broken_generation_config(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "model"))
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    assert read_generation_config(Folder(folder)) is None
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json can't be read"):
        read_generation_config(Folder(folder))
