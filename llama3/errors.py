"""What a person did that cannot work, each as one line that says what was found, where, and what to do.

Scripts print `str(error)` and exit with 2. A defect of the engine itself is never a UserError: it keeps its traceback.
"""


class UserError(ValueError):
    """Base of all errors that the person at the keyboard can put right. The message is a single line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class ConfigError(UserError):
    """config.json (or another JSON file of the folder) is corrupt, incomplete, or describes an unsupported model."""


class CheckpointError(UserError):
    """The safetensors files do not hold exactly the tensors that the config describes."""


class HubError(UserError):
    """The model name leads to no usable folder: missing, incomplete, not on the hub, gated, or offline."""


class TokenizerError(UserError):
    """The tokenizer files are missing, corrupt or do not fit the model, or a chat template cannot be rendered."""


class CapacityError(UserError):
    """The weights, the cache or the work space do not fit into the memory that there is."""


class DeviceError(UserError):
    """The device or the kernels asked for cannot be used on this machine."""


class RequestError(UserError):
    """A prompt or a sampling parameter cannot be served; in a list, the message names its index."""
