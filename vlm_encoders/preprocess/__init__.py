"""From an image in any form to the pixels that an encoder sees."""

from vlm_encoders.preprocess.forms import ImageLike
from vlm_encoders.preprocess.load import load_image
from vlm_encoders.preprocess.pixels import Preprocessor
from vlm_encoders.preprocess.sizes import MAX_PIXELS, cover_size, expand_size, fit_size

__all__ = ["MAX_PIXELS", "ImageLike", "Preprocessor", "cover_size", "expand_size", "fit_size", "load_image"]
