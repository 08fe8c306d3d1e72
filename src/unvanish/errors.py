"""What may go wrong with a *call*; what is wrong with a *training* is a finding, never an error.

UnvanishError
├── OptionError     (ValueError)   an argument has a value that cannot be used
├── LayerError      (LookupError)  a named layer is missing or cannot be watched
├── TargetError     (ValueError)   the script or factory to run cannot be found or loaded
├── RecordError     (ValueError)   a file is not a record of a run, or is damaged
├── StaleCacheError (RuntimeError) cached features were computed from something else
├── TreatmentError  (ValueError)   a treatment does not exist or cannot be applied here
└── WeightsError    (ValueError)   a weights file is damaged, or does not fit the model

Every message has four parts: where, what was found, what was expected, what to do.
"""


class UnvanishError(Exception):
    """The root of all errors raised on purpose by this package."""


class OptionError(UnvanishError, ValueError):
    """An argument has a value that cannot be used."""


class LayerError(UnvanishError, LookupError):
    """A named layer is missing or cannot be watched."""


class TargetError(UnvanishError, ValueError):
    """The script or factory to run cannot be found or loaded."""


class RecordError(UnvanishError, ValueError):
    """A file is not a record of a run, or is damaged."""


class StaleCacheError(UnvanishError, RuntimeError):
    """Cached features were computed from other weights, data or settings."""


class TreatmentError(UnvanishError, ValueError):
    """A treatment does not exist or cannot be applied here."""


class WeightsError(UnvanishError, ValueError):
    """A weights file is damaged or hostile, or does not fit the model."""
