"""The errors a user can cause and mend: one clear line each, naming the thing and the remedy."""

__all__ = ['UserError', 'DataError', 'SettingsError', 'StoreError', 'TrainingError']


class UserError(Exception): "Base of all errors that the command line prints as one line and exits with 2."
class DataError(UserError): "Data that is missing, unreadable or not what it claims to be."
class SettingsError(UserError): "An unknown or wrong-typed profile, paper, parameter, role or device."
class StoreError(UserError): "An artefact store that cannot be used: permissions, another version, a full disk."
class TrainingError(UserError): "A training that cannot go on, for example after a loss that is not a number."
