"""Optional packages of the conversion route."""

import importlib
import os
import warnings

from nd_jax.errors import UserError

# import name -> name on the package index
DISTRIBUTIONS = {
    "tensorflow": "tensorflow-cpu",
    "tf2onnx": "tf2onnx",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "onnxruntime_qnn": "onnxruntime-qnn",
    "torch": "torch",
    "diffusers": "diffusers",
    "qai_hub": "qai-hub",
}


def need(*modules: str) -> None:
    """Imports the packages, or raises a UserError that names the `pip install` for all that are missing."""
    # TensorFlow reads these once, when it is first imported, and greets the user with six lines otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    missing = []
    for module in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of packages about each other
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            missing.append(DISTRIBUTIONS[module])
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install {' '.join(missing)}")
