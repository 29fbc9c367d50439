# SPDX-License-Identifier: Apache-2.0
"""Few-step samplers in numpy: a sampler is a table of constants and a pure step.

Names are the maths: `x_t` latents at the current noise level, `x_0` the predicted clean latents, `eps` the
predicted noise. Every sampler equals the diffusers scheduler of its name to 1e-5 when both are handed the
same noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .errors import TurbopocketError
from .schedule import SamplerSpec, alphas_cumprod, timesteps

Array = NDArray[np.float32]
NoiseSource = Callable[[tuple[int, ...]], Array]
"""Fresh standard normal numbers of a shape; called only when a step needs them."""


class Sampler(ABC):
    """One walk from noise to clean latents: at each of `timesteps` ask the model, then `step`."""

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        self.spec = spec
        self.steps = steps
        self.timesteps = timesteps(spec, steps)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents the walk starts from."""
        return 1.0

    def scale_model_input(self, x_t: Array, step_index: int) -> Array:
        """`x_t` as the model wants to see it."""
        return x_t

    @abstractmethod
    def step(self, step_index: int, x_t: Array, model_output: Array, noise: NoiseSource) -> Array:
        """The latents one step cleaner than `x_t`, given what the model said about them."""


class _SigmaSampler(Sampler):
    """The variance-exploding view of Karras et al. 2022 (arXiv 2206.00364): x_t = x_0 + sigma * eps."""

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        super().__init__(spec, steps)
        alphas = alphas_cumprod(spec)
        sigmas = np.interp(self.timesteps, np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas))
        self.sigmas: Array = np.append(sigmas, 0.0).astype(np.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma, or sqrt(sigma^2 + 1) with leading spacing.

        Leading spacing starts short of pure noise, where latents have the signal's variance as well.
        """
        largest = self.sigmas.max()
        if self.spec.timestep_spacing == "leading":
            return float(np.sqrt(largest**2 + 1))
        return float(largest)

    def scale_model_input(self, x_t: Array, step_index: int) -> Array:
        """`x_t` back at unit variance, the scale of training."""
        return x_t / np.sqrt(self.sigmas[step_index] ** 2 + 1)

    def derivative(self, step_index: int, x_t: Array, model_output: Array) -> Array:
        """dx/dsigma at `x_t`, which is the predicted noise."""
        if self.spec.prediction_type == "epsilon":
            return model_output
        sigma = self.sigmas[step_index]
        x_0 = x_t / (sigma**2 + 1) - model_output * sigma / np.sqrt(sigma**2 + 1)
        return (x_t - x_0) / sigma


class EulerSampler(_SigmaSampler):
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 2 without churn)."""

    def step(self, step_index: int, x_t: Array, model_output: Array, noise: NoiseSource) -> Array:
        """The latents at the next sigma; draws no noise."""
        slope = self.derivative(step_index, x_t, model_output)
        return x_t + slope * (self.sigmas[step_index + 1] - self.sigmas[step_index])


class EulerAncestralSampler(_SigmaSampler):
    """Euler's method to a lower sigma, then fresh noise up to the next one: SDXL-Turbo's sampler."""

    def step(self, step_index: int, x_t: Array, model_output: Array, noise: NoiseSource) -> Array:
        """The latents at the next sigma; draws noise in every step but the last."""
        sigma, sigma_next = self.sigmas[step_index : step_index + 2]
        sigma_up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
        x_down = x_t + self.derivative(step_index, x_t, model_output) * (sigma_down - sigma)
        return x_down + noise(x_t.shape) * sigma_up if sigma_up > 0 else x_down


class _AlphaSampler(Sampler):
    """The variance-preserving view: x_t = sqrt(alpha) * x_0 + sqrt(1 - alpha) * eps."""

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        super().__init__(spec, steps)
        self.alphas = alphas_cumprod(spec)

    def predict(self, x_t: Array, model_output: Array, alpha: np.float32) -> tuple[Array, Array]:
        """(x_0, eps) as the model sees them; x_0 clipped where the spec says so, eps left as predicted."""
        signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
        if self.spec.prediction_type == "epsilon":
            x_0, eps = (x_t - sigma * model_output) / signal, model_output
        else:
            x_0, eps = signal * x_t - sigma * model_output, signal * model_output + sigma * x_t
        limit = self.spec.clip_sample_range
        return (x_0 if limit is None else np.clip(x_0, -limit, limit)), eps


class DdimSampler(_AlphaSampler):
    """DDIM with eta 0 (Song et al. 2021, arXiv 2010.02502, equation 12)."""

    def step(self, step_index: int, x_t: Array, model_output: Array, noise: NoiseSource) -> Array:
        """The latents one stride of timesteps earlier; draws no noise."""
        timestep = int(self.timesteps[step_index])
        earlier = timestep - self.spec.num_train_timesteps // self.steps
        final = np.float32(1) if self.spec.set_alpha_to_one else self.alphas[0]
        alpha_next = self.alphas[earlier] if earlier >= 0 else final
        x_0, eps = self.predict(x_t, model_output, self.alphas[timestep])
        return np.sqrt(alpha_next) * x_0 + np.sqrt(1 - alpha_next) * eps


class LcmSampler(_AlphaSampler):
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3)."""

    sigma_data = 0.5

    def step(self, step_index: int, x_t: Array, model_output: Array, noise: NoiseSource) -> Array:
        """The predicted clean latents, noised to the next timestep in every step but the last."""
        timestep = int(self.timesteps[step_index])
        scaled = np.float32(timestep * self.spec.timestep_scaling)
        c_skip = self.sigma_data**2 / (scaled**2 + self.sigma_data**2)
        c_out = scaled / np.sqrt(scaled**2 + self.sigma_data**2)
        x_0, _ = self.predict(x_t, model_output, self.alphas[timestep])
        denoised = c_out * x_0 + c_skip * x_t
        if step_index + 1 == self.steps:
            return denoised
        alpha_next = self.alphas[int(self.timesteps[step_index + 1])]
        return np.sqrt(alpha_next) * denoised + np.sqrt(1 - alpha_next) * noise(x_t.shape)


_SAMPLERS: dict[str, type[Sampler]] = {
    "euler": EulerSampler,
    "euler_ancestral": EulerAncestralSampler,
    "ddim": DdimSampler,
    "lcm": LcmSampler,
}


def make_sampler(spec: SamplerSpec, steps: int | None = None) -> Sampler:
    """The sampler that `spec` describes, for `steps` steps or as many as the spec was built for.

    Raises TurbopocketError when its schedule does not have that many.
    """
    try:
        return _SAMPLERS[spec.kind](spec, spec.steps if steps is None else steps)
    except ValueError as error:
        raise TurbopocketError(f"sampler {spec.kind}: {error}") from error
