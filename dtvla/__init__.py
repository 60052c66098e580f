"""dtvla: experiments with vision-language-action models that think before they act.

Importing the package costs nothing: every heavy library is imported by the room that needs it.
"""

__version__ = "0.1.0"
