# SPDX-License-Identifier: Apache-2.0
import os

# Else ONNX Runtime 1.31 writes a device's ID and a database of events below the home folder when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
