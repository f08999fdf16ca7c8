"A small-language-model library whose notebooks are its source."
import importlib

__version__ = "0.1.0"

# Public name -> (the module that defines it, rooms that add methods to it). Nothing is loaded
# before it is asked for.
_PUBLIC = {
    "BantamError": ("bantam.core",),
    "BantamConfig": ("bantam.config", "bantam.presets", "bantam.model.account"),
    "LayerConfig": ("bantam.config",),
    "TrainingArgs": ("bantam.args",),
    "SFTArgs": ("bantam.args",),
    "BantamTokenizer": ("bantam.text.tokenizer",),
    "ChatTemplate": ("bantam.text.template",),
    "BantamForCausalLM": ("bantam.model.lm", "bantam.model.files", "bantam.model.account",
                          "bantam.decode.generate"),
    "Trainer": ("bantam.train.trainer",),
    "generate": ("bantam.decode.generate",),
    "stream": ("bantam.decode.generate",),
    "BantamChat": ("bantam.chat.chat",),
    "chat_cell": ("bantam.chat.widget",),
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name):
    if name not in _PUBLIC: raise AttributeError(f"module 'bantam' has no attribute {name!r}")
    home, *more = _PUBLIC[name]
    for room in more: importlib.import_module(room)
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *_PUBLIC})
