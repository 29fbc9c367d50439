# SPDX-License-Identifier: Apache-2.0
if __name__ == "runtimes":  # `import runtimes` from the repository's root would make a second copy of every class
    raise ImportError("import turbopocket.runtimes, not runtimes")
