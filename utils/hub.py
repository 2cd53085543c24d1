"""Publish a trained detector on the Hugging Face hub, and fetch one; needs `pip install -e ".[hub]"`.

python3 utils/hub.py push --experiment experiments/birds --repo USER/birds --private
python3 utils/hub.py pull --repo USER/birds --out experiments/birds

A repository holds one checkpoint, the test graph as MXNet loads it, the last scores and a model card.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is used in place

from core.cli import run
from core.report.coco_files import read_json
from core.run.atomic_file import atomic_file
from core.run.experiment import GRAPH_FILE
from core.trained import Trained, find_trained
from core.weights.checkpoint import find_weights

CARD = "README.md"
PATTERNS = ["checkpoint-*", CARD, "*_scores.json"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Publish a trained detector on the Hugging Face hub, or fetch one.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="upload a checkpoint with a model card")
    push.add_argument(
        "--experiment", required=True, metavar="DIR", help="the folder of the experiment, or a checkpoint"
    )
    push.add_argument("--epoch", type=int, metavar="N", help="the checkpoint after N epochs, instead of the newest")
    push.add_argument("--repo", required=True, metavar="USER/NAME")
    push.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    push.add_argument("--license", metavar="NAME", help="of the weights, for the model card, such as apache-2.0")
    push.add_argument("--dry-run", metavar="DIR", help="write what would be uploaded into this folder, and stop")
    pull = commands.add_parser("pull", help="download a checkpoint")
    pull.add_argument("--repo", required=True, metavar="USER/NAME")
    pull.add_argument("--out", metavar="DIR", help="default experiments/NAME")
    pull.add_argument("--revision", metavar="REV", help="a branch, tag or commit; default the newest")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Push or pull; returns the exit status."""
    parsed = parse_arguments(arguments)
    if parsed.repo.count("/") != 1 or not all(parsed.repo.split("/")):
        raise ValueError(f"--repo: expected USER/NAME, got {parsed.repo!r}")
    if parsed.command == "push":
        trained = find_trained(parsed.experiment, epoch=parsed.epoch)
        if parsed.dry_run:
            files = write_repository(trained, Path(parsed.dry_run), parsed.repo, parsed.license)
            print(f"wrote {', '.join(files)} to {parsed.dry_run}")
        else:
            print(push(trained, parsed.repo, parsed.private, parsed.license))
        return 0
    out = Path(parsed.out or Path("experiments") / parsed.repo.rpartition("/")[2])
    print(
        f"wrote {pull(parsed.repo, out, parsed.revision)}; python3 detection_test.py --experiment {out} --images PATH"
    )
    return 0


def push(trained: Trained, repo: str, private: bool = False, licence: str | None = None) -> str:
    """Upload a detector and return the address of the repository, which is made if it does not exist."""
    api = hub().HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write_repository(trained, Path(folder), repo, licence)
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Add {trained.path.name}")
    return str(address)


def pull(repo: str, out: Path, revision: str | None = None) -> Path:
    """Download a detector into `out` and return its checkpoint.

    Raises ValueError if `out` has checkpoints already, or the repository has none.
    """
    if any(out.glob("checkpoint-*.safetensors")):
        raise ValueError(f"{out} has checkpoints already: name another folder with --out, or remove them")
    hub().snapshot_download(repo, revision=revision, local_dir=str(out), allow_patterns=PATTERNS)
    try:
        path = find_weights(out)
    except FileNotFoundError:
        raise ValueError(f"{repo} has no checkpoint of this program (checkpoint-*.safetensors)") from None
    find_trained(path)
    return path


def hub() -> Any:
    """Return the module huggingface_hub. Raises ValueError, with the remedy, if it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError('huggingface_hub is not installed: pip install -e ".[hub]"') from None
    return huggingface_hub


def write_repository(trained: Trained, folder: Path, repo: str, licence: str | None = None) -> list[str]:
    """Write the files of a repository into `folder` and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(trained.path, folder / trained.path.name)
    with atomic_file(folder / GRAPH_FILE) as handle:
        handle.write(trained.config.ModelParam.test_symbol.tojson().encode())
    for scores in _score_files(trained):
        shutil.copy(scores, folder / scores.name)
    with atomic_file(folder / CARD) as handle:
        handle.write(model_card(trained, repo, licence).encode())
    return sorted(path.name for path in folder.iterdir())


def model_card(trained: Trained, repo: str, licence: str | None = None) -> str:
    """Return the model card: metadata of the hub, provenance, scores and how to use the detector."""
    name = repo.rpartition("/")[2]
    front = ["---", "library_name: necklace", "pipeline_tag: object-detection", "tags:", "- object-detection"]
    front += ([f"license: {licence}"] if licence else []) + ["---"]
    facts = [f"| {key} | {_cell(value)} |" for key, value in trained.provenance().items()]
    lines = [
        *front,
        "",
        f"# {name}",
        "",
        f"A one-stage detector of {len(trained.class_names)} classes, trained with Necklace.",
        "",
        "| | |",
        "|---|---|",
        *facts,
        "",
        *_scores(trained),
        "## Use",
        "",
        "```",
        f"python3 utils/hub.py pull --repo {repo}",
        f"python3 detection_test.py --experiment experiments/{name} --images PATH",
        "```",
        "",
        "```python",
        "from core.detector import Detector",
        "",
        f'found = Detector("experiments/{name}")("image.jpg")',
        "found.boxes, found.scores, found.names",
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _score_files(trained: Trained) -> list[Path]:
    """Return the scores in the experiment's folder that are of this checkpoint."""
    files = sorted(trained.path.parent.glob("*_scores.json"))
    return [path for path in files if read_json(path).get("checkpoint") == trained.path.name]


def _scores(trained: Trained) -> list[str]:
    """Return a table of the scores of the checkpoint's tests; nothing if there are none."""
    rows = []
    for path in _score_files(trained):
        scores = read_json(path)["stats"]
        rows.append(f"| {path.name.removesuffix('_scores.json')} | {scores['AP']:.3f} | {scores['AP50']:.3f} |")
    return ["## Scores", "", "| tested on | AP | AP50 |", "|---|---|---|", *rows, ""] if rows else []


if __name__ == "__main__":
    run(main)
