"""Which model is measured: a folder or hub name with its weights, or a published shape with random ones."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.engines import LoadSpec
from llama3.config import ModelConfig
from llama3.device import resolve_dtype
from llama3.errors import RequestError
from llama3.hub import resolve_folder
from llama3.shapes import shape_config
from tools.make_random_model import hf_config, make_random_model

# The schema of transformers 4 is read by every version of every engine here.
CONFIG_SCHEMA = 4


@dataclass(frozen=True)
class Target:
    """name: as printed. folder: holds config.json, and the weights unless they are random."""

    name: str
    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    random_weights: bool

    @classmethod
    def from_model(cls, name: str, dtype: str) -> "Target":
        """A local folder or a hub name. Raises UserError if there is none."""
        folder = resolve_folder(name)
        config = ModelConfig.from_folder(folder)
        # Results are published: a folder goes by its last name, not by where it lies on this machine.
        title = Path(name).name if Path(name).is_absolute() else name
        return cls(title, Path(folder), config, resolve_dtype(dtype, config), random_weights=False)

    @classmethod
    def from_shape(cls, shape: str, dtype: str, folder: Path) -> "Target":
        """A shape of `llama3.shapes`; writes `folder`/config.json alone, from which every engine makes up weights."""
        config = shape_config(shape)
        resolved = resolve_dtype(dtype, config)
        folder.mkdir(parents=True, exist_ok=True)
        token_ids = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(config.eos_token_ids)}
        values = hf_config(config, resolved, CONFIG_SCHEMA) | token_ids
        path, text = folder / "config.json", json.dumps(values, indent=2) + "\n"
        if not path.exists() or path.read_text() != text:  # another run may be reading it
            path.write_text(text)
        return cls(shape, folder, replace(config, dtype=resolved), resolved, random_weights=True)

    def with_weights(self, folder: Path) -> "Target":
        """The same with weights to load: writes a random checkpoint into `folder` unless one lies there already."""
        if not self.random_weights:
            return self
        if not (folder / "config.json").exists():
            # Whole or not at all: writing gigabytes may be stopped.
            partial = folder.with_name(folder.name + ".partial")
            for incomplete in (partial, folder):
                shutil.rmtree(incomplete, ignore_errors=True)
            make_random_model(partial, self.config, self.dtype, progress=False)
            partial.replace(folder)
        config = ModelConfig.from_folder(folder)
        return replace(self, folder=folder, config=config, random_weights=False)

    def check(self, cases: tuple[Case, ...]) -> None:
        """Raise RequestError for a case that is longer than the model's context."""
        longest = max(cases, key=lambda case: case.max_model_len)
        if longest.max_model_len > self.config.max_position_embeddings:
            raise RequestError(
                f"the case {longest} needs {longest.max_model_len} positions, and {self.name} has "
                f"max_position_embeddings {self.config.max_position_embeddings}: choose shorter cases"
            )

    def load_spec(
        self, cases: tuple[Case, ...], device: str, kernels: str, seed: int, options: dict[str, object]
    ) -> LoadSpec:
        """What every engine of a run is told to load."""
        return LoadSpec(
            name=self.name,
            folder=str(self.folder),
            random_weights=self.random_weights,
            max_model_len=max(case.max_model_len for case in cases),
            dtype=str(self.dtype).removeprefix("torch."),
            device=device,
            kernels=kernels,
            seed=seed,
            options=options,
        )
