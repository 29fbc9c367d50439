# SPDX-License-Identifier: Apache-2.0
if __name__ == "ground":  # `import ground` from the repository's root would make a second copy of every class
    raise ImportError("import turbopocket.ground, not ground")
