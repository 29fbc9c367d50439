# SPDX-License-Identifier: Apache-2.0
"""Manifests of older schemas, brought up to the newest: what they left to every reader's code is written down."""

from typing import Any

_PACKAGE_NAMES = {
    "text_encoder": {"pooler_output": "pooled_outputs"},
    "text_encoder_2": {"text_embeds": "pooled_outputs"},
    "vae_encoder": {"sample": "x", "latent_parameters": "latent", "latent_sample": "latent_sample"},
    "unet": {"out_sample": "noise_pred"},
    "vae_decoder": {"latent_sample": "z", "sample": "image"},
}
"""Core ML's names by the loop's, which were all that schema 1 said."""
_FLOAT32 = ("input_ids", "sample", "timestep", "time_ids", "image", "x", "latent")
"""Tensors of packages that were not float16; `latent_sample` of an encoder was the fourth of the VAE's."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1, as JSON values, in the form of schema 2.

    Schema 1 knew two families, `sd` and `sdxl`, and components by their names. Raises LookupError, TypeError,
    AttributeError or ValueError for values that no build of that schema wrote.
    """
    values = dict(values)
    zeros = values.pop("force_zeros_for_empty_prompt")
    components, image = values["components"], values["image"]
    values["pipeline"] = _pipeline(values["family"], components, "zeros" if zeros else "empty prompt")
    values["sampler_table"] = None
    values.setdefault("sizes", [[image["height"], image["width"]]])
    if values["target"] == "coreml":
        told = "timestep_cond" in _names(components["unet"]["inputs"])
        batch = 2 if values["sampler"]["guidance_scale"] > 1 and not told else 1
        values["components"] = {name: _packages(name, spec, batch) for name, spec in components.items()}
    return values | {"schema_version": 2}


def _pipeline(family: str, components: dict[str, Any], without_prompt: str) -> dict[str, Any]:
    fed_by = {
        "sd": [["text_encoder", "last_hidden_state"]],
        "sdxl": [
            [name, _penultimate(components[name])] for name in ("text_encoder", "text_encoder_2") if family == "sdxl"
        ],
    }[family]
    feeds: dict[str, Any] = {"encoder_hidden_states": _text(fed_by)}
    if family == "sdxl":
        feeds["text_embeds"] = _text([["text_encoder_2", "text_embeds"]])
        feeds["time_ids"] = {"kind": "numbers", "values": ["height", "width", 0.0, 0.0, "height", "width"]}
    for spec in components["unet"]["inputs"]:
        if spec["name"] == "timestep_cond":
            feeds["timestep_cond"] = {"kind": "guidance", "width": spec["shape"][-1]}
    denoiser = {"component": "unet", "latents": "sample", "timestep": "timestep", "output": "out_sample"}
    encoder = None
    if "vae_encoder" in components:
        [output] = _names(components["vae_encoder"]["outputs"])
        gives = {"latent_sample": "latents", "latent_parameters": "means and log variances"}[output]
        encoder = {"component": "vae_encoder", "picture": "sample", "output": output, "gives": gives}
    return {
        "text_encoders": {component: {} for component, _ in fed_by},
        "denoiser": denoiser | {"inputs": feeds},
        "without_prompt": without_prompt,
        "decoder": {"component": "vae_decoder", "latents": "latent_sample", "output": "sample"},
        "encoder": encoder,
    }


def _text(outputs: list[list[str]]) -> dict[str, Any]:
    return {"kind": "text", "join": [{"component": component, "output": output} for component, output in outputs]}


def _penultimate(spec: dict[str, Any]) -> str:
    """The state before the last layer, counted from the embedding up where the graph gives all of them."""
    names = _names(spec["outputs"])
    count = sum(name.startswith("hidden_states.") for name in names)
    return "hidden_embeds" if "hidden_embeds" in names else f"hidden_states.{count - 2}"


def _packages(component: str, spec: dict[str, Any], batch: int) -> dict[str, Any]:
    """The tensors that the packages have, and how the loop has them: the only ones that schema 1 listed."""
    items = batch if component == "unet" else 1
    first = spec["file"].split("/")[0]
    packages = [first, first.replace("Chunk1.", "Chunk2.")] if first.endswith("Chunk1.mlpackage") else [first]
    own: dict[str, Any] = {"file": spec["file"], "packages": packages}
    loop: dict[str, Any] = {}
    for side in ("inputs", "outputs"):
        loop[side] = [_loop_tensor(component, each) for each in spec[side]]
        own[side] = [_package_tensor(component, each, items) for each in loop[side]]
    return own | {"loop": loop}


def _loop_tensor(component: str, spec: dict[str, Any]) -> dict[str, Any]:
    layouts = {"timestep": "repeated", "encoder_hidden_states": "B D 1 T"}
    tensor = _PACKAGE_NAMES[component].get(spec["name"], spec["name"])
    return spec | {"tensor": tensor, "layout": layouts.get(spec["name"], "as it is")}


def _package_tensor(component: str, loop: dict[str, Any], items: int) -> dict[str, Any]:
    name, (_, *rest) = loop["tensor"], loop["shape"] or [None]
    if loop["layout"] == "B D 1 T":
        tokens, width = rest
        rest = [width, 1, tokens]
    exact = name in _FLOAT32 or (component, name) == ("vae_encoder", "latent_sample")
    return {"name": name, "dtype": "float32" if exact else "float16", "shape": [items, *rest]}


def _names(tensors: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in tensors]
