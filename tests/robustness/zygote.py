# SPDX-License-Identifier: Apache-2.0
"""Runs commands in forked children with limits on time and memory: libraries are imported once, crashes stay apart.

Reads a JSON object a line on stdin, answers with one on stdout. Started by `children`, as a script.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from typing import Any

SAMPLER = {"steps": 2, "guidance": 1.0}
MEMORY_BYTES = 6 << 30
"""Private writable memory of a child, most of it what the libraries only reserve."""


def child(job: dict[str, Any]) -> int:
    """Runs the job's command as a user's terminal would; its exit code."""
    os.setsid()
    out, err = (os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("stdout", "stderr"))
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(job["folder"])
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes for what it knows of memory
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(job["seconds"]), int(job["seconds"])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    exec(job["planted"], {})
    try:
        if job["verb"] == "read":
            from turbopocket.door import run_command

            run_command(lambda: read_model(job["model"]))
        else:
            from turbopocket.cli import main

            sys.argv = ["turbopocket", *job["arguments"]]
            main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 99


def read_model(folder: str) -> int:
    """All that a build does with a model before it traces it: configs, weights, tokenizers, every graph once."""
    import torch

    from turbopocket.export.checkpoint.load import load, load_shapes, tokenizer_json
    from turbopocket.export.families.components import components_of
    from turbopocket.export.families.sizes import drawn_sizes
    from turbopocket.export.recipe import make_recipe
    from turbopocket.export.sampling.spec import sampler_spec, with_sampling

    recipe, _ = with_sampling(
        make_recipe({"model": {"source": folder}, "sampler": SAMPLER}, "corpus"), load_shapes(folder)
    )
    model = load(folder, steps=recipe.sampler.steps)
    sampler_spec(model, recipe.sampler)
    for tokenizer in model.tokenizers.values():
        tokenizer_json(tokenizer, model.family.tokenizer, model.text_tokens)
    with torch.no_grad():
        for component in components_of(model, drawn_sizes(model, ())):
            component.module(*component.example_inputs.values())
    return 0


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """How the child of one job ended."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 98
        try:
            code = child(job)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    hung = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if not hung and time.monotonic() - start > job["seconds"]:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started and left
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "hung": hung or code == -signal.SIGXCPU, "seconds": time.monotonic() - start}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    for name in json.loads(sys.argv[1]):
        __import__(name)
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
