# SPDX-License-Identifier: Apache-2.0
if (
    __name__ == "runtimes"
):  # run from the repository's root, `import runtimes` would make a second copy of every class
    raise ImportError("import turbopocket.runtimes, not runtimes")
