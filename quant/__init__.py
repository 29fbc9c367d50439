# SPDX-License-Identifier: Apache-2.0
if __name__ == "quant":  # `import quant` from the repository's root would make a second copy of every class
    raise ImportError("import turbopocket.quant, not quant")
