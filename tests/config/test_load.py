"""Config files: errors are reported with file and line, and the formatted config can be read back."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from config.load import format_config, load_config


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.ResizeParam.shrt = 640", "ResizeParam has no field 'shrt'; nearest: short"),
        ("config.ResizeParm.short = 640", "Config has no field 'ResizeParm'; nearest: ResizeParam"),
        (
            "config.ResizeParam.short = '640'",
            "ResizeParam.short: expected an integer, such as 640; got '640'",
        ),
        ("config.KvstoreParam.fp16 = False", "fp16 follows from General.fp16 and bf16 and cannot be set"),
        ("x = config.KvstoreParam.fp16", "fp16 follows from General.fp16 and bf16 and is not filled yet"),
        ("config.ModelParam.neck = NASFPN", "NameError: name 'NASFPN' is not defined"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("config.ResizeParam.short = = 3", "not valid Python: invalid syntax"),
    ],
)
def test_a_mistake_in_a_config_file_is_located(write_config: Callable[..., Path], line: str, message: str) -> None:
    path = write_config("config.General.seed = 1", line)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, line 5: ')}.*{re.escape(message)}"):
        load_config(path, is_train=True)


def test_the_innermost_line_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def change(x):\n    return x / 0\n\n\ndef get_config(is_train):\n    return change(1)\n")
    with pytest.raises(ValueError, match=r"a.py, line 2: ZeroDivisionError: division by zero"):
        load_config(path, is_train=True)


def test_a_mistake_outside_get_config(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("from config.schema import Config\nfrom config.NASFPN.recipe import retina_50epoch\n")
    with pytest.raises(ValueError, match=r"a.py, line 2: ImportError: cannot import name 'retina_50epoch'"):
        load_config(path, is_train=True)


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"a.py: expected a function get_config\(is_train: bool\) -> Config"):
        load_config(path, is_train=True)
    path.write_text("def get_config(is_train):\n    return 1\n")
    with pytest.raises(ValueError, match=r"must return a config.schema.Config, got int; start from a recipe such as"):
        load_config(path, is_train=True)
    path.write_text("def get_config():\n    return 1\n")
    with pytest.raises(ValueError, match=r"a.py: TypeError: get_config\(\) takes 0 positional arguments"):
        load_config(path, is_train=True)


def test_a_missing_file_names_its_neighbours(config_folder: Path, tmp_path: Path) -> None:
    wanted = config_folder / "NASFPN" / "retina_r50v1b_tdbu_1280_3@384.py"
    with pytest.raises(
        FileNotFoundError,
        match=r"3@384.py does not exist; nearest in .*: retina_r50v1b_tdbu_1280_3@384_25epoch.py",
    ):
        load_config(wanted, is_train=True)
    with pytest.raises(FileNotFoundError, match=r"does not exist, nor does the folder"):
        load_config(tmp_path / "gone" / "a.py", is_train=True)
    with pytest.raises(FileNotFoundError, match=r"a.py does not exist; nearest in .*: no config file"):
        load_config(tmp_path / "a.py", is_train=True)
    with pytest.raises(
        ValueError, match=r"expected a config file \(.py\), got a folder, which contains retina_.*_25epoch.py"
    ):
        load_config(config_folder / "NASFPN", is_train=True)


def test_only_config_files_are_offered(config_folder: Path, tmp_path: Path) -> None:
    for name in ("recipes.py", "retina.py"):
        with pytest.raises(FileNotFoundError, match=r"nearest in .*: retina_") as error:
            load_config(config_folder / "NASFPN" / name, is_train=True)
        assert "recipe.py" not in str(error.value)
    (tmp_path / "birds.py").write_text("import config\n\n\ndef get_config(is_train):\n    return 1\n")
    (tmp_path / "brids_tools.py").write_text("from birds import get_config\n")
    (tmp_path / "brids_folder.py").mkdir()
    with pytest.raises(FileNotFoundError, match=r": birds\.py$"):
        load_config(tmp_path / "brids.py", is_train=True)


def test_an_edited_file_is_read_again(write_config: Callable[..., Path], no_data: str) -> None:
    for seed in (1, 2):  # same size, same second: a compiled copy must not be taken for the file
        path = write_config(f"config.General.seed = {seed}")
        assert load_config(path, True, [no_data]).General.seed == seed
    assert not (path.parent / "__pycache__").exists()


def test_overrides_come_before_what_is_derived(nasfpn_640: Path, no_data: str) -> None:
    config = load_config(nasfpn_640, True, ["ResizeParam.short=256", "ResizeParam.long=256", no_data])
    assert config.AnchorTarget2DParam.generate.short == (32, 16, 8, 4, 2)


def test_what_cannot_work_is_refused(write_config: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"ResizeParam.short: expected a multiple of 128"):
        load_config(write_config("config.ResizeParam.short = 600"), is_train=True)


def test_the_formatted_config_gives_the_same_config(nasfpn_640: Path, no_data: str) -> None:
    changes = ["DatasetParam.image_set=ImageSet('mine', 'a.json', 'b')", "RpnParam.num_class=3", no_data]
    config = load_config(nasfpn_640, True, [*changes, "KvstoreParam.gpus=cpu", "General.name=it's"])
    text = format_config(config)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert format_config(load_config(nasfpn_640, True, lines)) == text
    assert "KvstoreParam.gpus = ()" in lines
    assert "OptimizeParam.optimizer.lr = 0.01" in lines
    assert "# KvstoreParam.batch_image = 8" in text.splitlines()
    assert "# ModelParam.neck = NASFPNNeck" in text.splitlines()
    assert re.search(r"^# ModelParam.train_symbol = a graph of \d+ nodes$", text, re.MULTILINE)
    assert re.search(r"^# transform = sample ReadRoiRecord, .*, batch ConvertImage", text, re.MULTILINE)


def test_loading_twice_gives_equal_graphs(nasfpn_640: Path, no_data: str) -> None:
    first, second = (load_config(nasfpn_640, True, [no_data]).ModelParam for _ in range(2))
    assert first.train_symbol.tojson() == second.train_symbol.tojson()
    assert first.test_symbol.tojson() == second.test_symbol.tojson()
