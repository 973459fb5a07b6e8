"""Functions of torch.nn.utils.rnn."""

from typing import TYPE_CHECKING

from .packed_sequence import PackedSequence as PackedSequence
from .packed_sequence import pack_padded_sequence as pack_padded_sequence
from .packed_sequence import pack_sequence as pack_sequence
from .packed_sequence import pad_packed_sequence as pad_packed_sequence
from .packed_sequence import unpack_sequence as unpack_sequence
from .packed_sequence import unpad_sequence as unpad_sequence
from .sequences import pad_sequence as pad_sequence

if not TYPE_CHECKING:
    from ...module import torch_names as _torch_names

    __getattr__, __dir__ = _torch_names.hooks(globals(), "nn.utils.rnn")
