# SPDX-License-Identifier: Apache-2.0
"""Whether a phone has the memory that drawing takes, before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.devices import DEVICES, Device, DeviceFit
from turbopocket.export.plan import Planned, plan
from turbopocket.export.recipe import make_recipe
from turbopocket.ground.errors import TurbopocketError
from turbopocket.quant.peak import ComponentMemory

from .published_sdxl import write_configs

GB = 10**9
PHONE = "iphone-13-pro"  # 3.12 GB for an app, 4.20 with the entitlement


@pytest.mark.parametrize(
    ("unet", "decoder", "verdict"),
    [
        (1.0, 1.5, "fits"),
        (2.0, 2.9, "fits when one component is open at a time"),
        (1.0, 3.2, "fits with the entitlement com.apple.developer.kernel.increased-memory-limit"),
        (3.0, 3.2, "fits with the entitlement com.apple.developer.kernel.increased-memory-limit when one component is"),
        (1.0, 4.3, "does not fit: vae_decoder alone is 100.00 MB over"),
    ],
)
def test_how_it_fits(unet: float, decoder: float, verdict: str) -> None:
    """What the UNet holds, and what the decoder computes with."""
    components = {"unet": ComponentMemory(int(unet * GB), 0), "vae_decoder": ComponentMemory(0, int(decoder * GB))}
    fit = DeviceFit(PHONE, components)
    assert fit.verdict.startswith(verdict)
    assert fit.fits == verdict.startswith("fits")
    assert fit.verdict in fit.line
    assert DEVICES[PHONE].source in fit.line


def planned(folder: Path, size: str, *devices: str, **compress: Any) -> Planned:
    values = {
        "model": {"source": str(folder)},
        "sampler": {"steps": 1, "guidance": 0.0},
        "image": {"sizes": [size]},
        "compress": {"formats": ["int4-row", "int8-row"], "budget": "2.2GB", **compress},
    }
    return plan(make_recipe(values, "test"), devices=devices)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_configs(tmp_path_factory.mktemp("published"))


def test_sdxl_fits_a_phone_at_512_and_its_decoder_not_at_1024(sdxl: Path) -> None:
    (small,), (large,) = (planned(sdxl, size, "iphone-12-mini").devices for size in ("512x512", "1024x1024"))
    assert (small.fits, large.fits) == (True, False)
    assert (small.largest, large.largest) == ("unet", "vae_decoder")
    decoder = large.components["vae_decoder"]
    assert decoder.running == pytest.approx(4 * small.components["vae_decoder"].running, rel=0.05)


def test_a_device_is_a_limit_where_a_plan_can_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the entitlement if that is enough, else with it, and where nothing fits the plan is as it would be."""
    recipe = make_recipe({"compress": {"formats": ["int8-row", "int4-row", "fp16"]}}, "test")
    free = plan(recipe)
    most = max(each.peak for each in free.plan.memory.values())
    least = max(
        each.peak for each in plan(make_recipe({"compress": {"formats": ["int4-row"]}}, "t")).plan.memory.values()
    )
    assert least < 0.9 * most
    enough = (least + most) // 2

    def asked(app_bytes: int, entitled_bytes: int | None) -> Planned:
        monkeypatch.setitem(DEVICES, "toy", Device(10**9, app_bytes, entitled_bytes, "a test"))
        return plan(recipe, devices=["toy"])

    for found in (asked(enough, None), asked(least // 2, enough), asked(enough, 2 * most)):
        assert found.plan.peak_memory_bytes == enough
        assert max(each.peak for each in found.plan.memory.values()) <= enough
        assert found.devices[0].fits
        assert found.bound_by == ("unet",)
    nothing = asked(least // 2, None)
    assert nothing.plan == free.plan
    assert nothing.devices[0].verdict.startswith("does not fit: unet alone is ")


def test_a_device_that_is_not_known_is_named(sdxl: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"^no device is called nokia: known are iphone-12-mini, "):
        planned(sdxl, "512x512", "nokia")


def test_the_command_ends_with_2_when_a_phone_has_too_little(sdxl: Path, turbopocket: Callable[..., Any]) -> None:
    asked = ("plan", sdxl, "--set", "sampler.steps=1", "--set", "sampler.guidance=0", "--json", "--device")
    large = ("--set", 'image.sizes=["1024x1024"]', "--formats", "int4-row,int8-row", "--budget", "2.2GB")
    too_small = turbopocket(*asked, "iphone-12-mini", "--device", "android-16gb", *large)
    assert too_small.code == 2
    told = json.loads(too_small.out)["devices"]
    assert [(each["device"], each["fits"]) for each in told] == [("iphone-12-mini", False), ("android-16gb", True)]
    assert turbopocket(*asked, "android-16gb", *large).code == 0
