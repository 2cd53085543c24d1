"""Export of a detector to an ONNX file, with its certificate."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.export.certificate import Certificate, certify, detect_all
from core.export.images import Images
from core.run.atomic_file import atomic_file

if TYPE_CHECKING:
    from config.schema import Config

CERTIFICATE_SUFFIX = ".certificate.txt"  # after the name of the file


def export_onnx(
    config: Config,
    weights: Mapping[str, Tensor],
    out: str | Path,
    *,
    class_names: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    raw: bool = False,
    portrait: bool = False,
    certificate: Callable[[bytes], Certificate] | None = None,
) -> Certificate | None:
    """Write the detector of a config to an ONNX file; for its inputs and outputs see `detector_graph.detector_model`.

    weights: parameters and auxiliary states by name. class_names: () for those of the config's image sets. provenance:
    origin of the weights, for the metadata. certificate: returns the certificate of the file's content, for its
    metadata and for `<out>.certificate.txt`; both files are written when everything has been computed, also if the
    tolerances are not met.

    Raises ValueError for what cannot be exported, for weights of another network, and if a package is missing; OSError
    if a file cannot be written.
    """
    require_packages("onnx")
    from core.export.detector_graph import detector_model

    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
    names = class_names or config.DatasetParam.class_names
    model = detector_model(config, arrays, names, raw=raw, portrait=portrait)
    certified = None if certificate is None else certificate(model.SerializeToString())
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    extra = {"provenance": json.dumps(provenance)} if provenance else {}
    if certified is not None:
        extra["certificate"] = certified.to_json()
    for key, value in extra.items():
        model.metadata_props.add(key=key, value=value)
    if certified is not None:
        with atomic_file(f"{out}{CERTIFICATE_SUFFIX}") as handle:
            handle.write(certified.text().encode())
    with atomic_file(out) as handle:
        handle.write(model.SerializeToString())
    return certified


def certify_onnx(
    config: Config, weights: Mapping[str, Tensor], source: str | Path, images: Images, content: bytes
) -> Certificate:
    """Return the certificate of an ONNX file's content in onnxruntime against torch in float32, on the CPU.

    Raises ValueError, naming `source`, for weights of another network.
    """
    require_packages("onnxruntime")
    import onnxruntime

    from core.export.runners import onnx_run, torch_run

    place = f"CPU, {torch.get_num_threads()} threads"
    subject = f"ONNX, {len(content) / 1e6:.1f} MB, in onnxruntime {onnxruntime.__version__}, {place}"
    return certify(
        detect_all(onnx_run(config, content), images.batches, subject),
        detect_all(torch_run(config, weights, source), images.batches, f"torch {torch.__version__}, float32, {place}"),
        images=images.name,
        score=images.score,
    )


def require_packages(*names: str) -> None:
    """Raise ValueError for packages of the extra `export` that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"an export needs {', '.join(missing)}: pip install {' '.join(missing)}")
