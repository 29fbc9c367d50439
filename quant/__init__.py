# SPDX-License-Identifier: Apache-2.0
if (
    __name__ == "quant"
):  # run from the repository's root, `import quant` would make a second copy of every class
    raise ImportError("import turbopocket.quant, not quant")
