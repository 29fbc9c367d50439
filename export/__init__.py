# SPDX-License-Identifier: Apache-2.0
if __name__ == "export":  # `import export` from the repository's root would make a second copy of every class
    raise ImportError("import turbopocket.export, not export")
