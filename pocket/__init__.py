# SPDX-License-Identifier: Apache-2.0
if __name__ == "pocket":  # `import pocket` from the repository's root would make a second copy of every class
    raise ImportError("import turbopocket.pocket, not pocket")
