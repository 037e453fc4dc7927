"""linformer_kernels as a kernel of the Hugging Face Hub: the package is `package`, beside what the builder adds."""

from .package import *  # noqa: F403
from .package import __all__ as __all__
