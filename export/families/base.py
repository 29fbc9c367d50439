# SPDX-License-Identifier: Apache-2.0
"""What a model family is, and what loading a checkpoint gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...runtimes.image_size import ImageSize
from ...runtimes.manifest import ComponentSpec
from ...runtimes.pipeline import Pipeline
from .graphs import Component
from .keys import KeyTable
from .tokenizers import CLIP, TokenizerKind


@dataclass(frozen=True)
class ModuleSpec:
    """One PyTorch module of a family: the class its folder must hold, and what is done about each key of its config.

    `renames` turn published tensor names into the class's own: (regular expression, replacement), in order.
    `others` are classes that the folder may hold instead, `former_names` those that files gave this class before.
    `tied` are names of one tensor, each with the other that is stored where it is not; the class knows both.
    """

    library: Literal["diffusers", "transformers"]
    class_name: str
    keys: KeyTable
    renames: tuple[tuple[str, str], ...] = ()
    others: tuple["ModuleSpec", ...] = ()
    former_names: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every name that a config may have for the class."""
        return (self.class_name, *self.former_names)

    @property
    def named(self) -> list[str]:
        """Library and class, as a model_index.json names them."""
        return [self.library, self.class_name]

    def is_named(self, library_and_class: Any) -> bool:
        """Whether that is how a model_index.json names the class, now or before."""
        return library_and_class in [[self.library, name] for name in self.class_names]

    @property
    def titled(self) -> str:
        """The class with its article."""
        return f"{'an' if self.class_name.startswith('A') else 'a'} {self.class_name}"

    @property
    def weights_stem(self) -> str:
        """The library's name for a weight file, without suffixes."""
        return {"diffusers": "diffusion_pytorch_model", "transformers": "model"}[self.library]


@dataclass(frozen=True)
class GraphOptions:
    """Which graphs are asked of a family: for pictures of these `sizes`, at least one.

    Without `all_states` text encoders give only the hidden states that a pipeline reads. `image_to_image` adds what
    reads a first picture.
    """

    sizes: Sequence[ImageSize]
    all_states: bool = True
    image_to_image: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """Everything that tells one kind of checkpoint from another; a new family is one more of these values.

    Tokenizer `tokenizer<suffix>` belongs to module `text_encoder<suffix>`. `other_pipeline_classes` draw alike. `keys`
    are those of model_index.json beside the parts; `pipeline_defaults` are the pipeline's own values for settings that
    a model_index.json leaves out.

    `components` gives a model's graphs in the order in which drawing runs them, `pipeline` says how drawing puts them
    together, from what a manifest says of each. `denoiser` is the module, and graph, that is asked at every step;
    `guidance` the pipeline's own where a call says nothing. `scheduler_settings` are what the pipeline takes whatever
    the scheduler's config says. `check` raises TurbopocketError for modules that do not fit each other.
    `tokenizer` is the kind of all tokenizers, `prompt_tokens` how many ids a prompt has where the pipeline says it.
    `old_least_sample_size` is what a smaller `sample_size` means in a file by diffusers before 0.9.0, and
    `sample_size` is the pipeline's own where the denoiser's config has none. `schedulers` are the only classes
    of a scheduler that go with such a model, where samplers here do not decide it.

    `only_planned` says what a build of such a model lacks, where nothing but a plan is made of its folder yet, and
    `notes` what a plan counts of it.

    diffusers' pipeline is made with the further arguments `diffusers_parts` (None and
    False switch off what judges or marks pictures), and called with `diffusers_call`.
    """

    name: str
    pipeline_class: str
    modules: Mapping[str, ModuleSpec]
    keys: KeyTable
    components: Callable[["LoadedModel", GraphOptions], list[Component]]
    pipeline: Callable[["LoadedModel", Mapping[str, ComponentSpec]], Pipeline]
    check: Callable[[Mapping[str, nn.Module], Path], None]
    guidance: float
    denoiser: str = "unet"
    tokenizer: TokenizerKind = CLIP
    prompt_tokens: int | None = None
    old_least_sample_size: int = 1
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
    diffusers_parts: Mapping[str, Any] = field(default_factory=dict)
    diffusers_call: Mapping[str, Any] = field(default_factory=dict)
    other_pipeline_classes: tuple[str, ...] = ()
    pipeline_defaults: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int | None = None
    schedulers: tuple[str, ...] = ()
    only_planned: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def pipeline_classes(self) -> tuple[str, ...]:
        """Every pipeline class whose folders are of this family."""
        return (self.pipeline_class, *self.other_pipeline_classes)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizer folders, one per text encoder."""
        encoders = (name for name in self.modules if name.startswith("text_encoder"))
        return tuple(name.replace("text_encoder", "tokenizer") for name in encoders)

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of all folders that a checkpoint of this family must hold."""
        return (*self.modules, *self.tokenizers, "scheduler")


@dataclass(frozen=True)
class LoadedModel:
    """One checkpoint: its modules in eval mode, fp32, without gradients, and the settings of its pipeline.

    Weights of Linear and Conv2d are in memory while their layer runs (`quant.layers`); all else is there.

    `folder` holds the pipeline's own settings. `modules` are those of the family, such as `text_encoder`, `unet` and
    `vae`; `weights` says in which folder or single file each of them is stored, `notes` what of all this was
    assumed. `tokenizers` maps each text encoder to the folder of its tokenizer. With `has_weights` false every tensor
    is on the meta device, and tokenizers and the scheduler's config may be absent, which then says its class alone.
    `text_tokens` is how many ids every text encoder reads. `prompt_replacements` are, for a text encoder, tokens that
    stand for several vectors and the text that names all of these.
    `image_size` is the picture that the denoiser was trained for, in pixels.
    """

    name: str
    family: ModelFamily
    folder: Path
    modules: Mapping[str, nn.Module]
    tokenizers: Mapping[str, Path]
    text_tokens: int
    prompt_replacements: Mapping[str, Mapping[str, str]]
    scheduler_config: Mapping[str, Any]
    pipeline_config: Mapping[str, Any]
    image_size: ImageSize
    vae_scale_factor: int
    has_weights: bool
    weights: Mapping[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def denoiser(self) -> Any:
        """The module that is asked at every step."""
        return self.modules[self.family.denoiser]
