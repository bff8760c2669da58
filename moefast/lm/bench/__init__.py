"""Tokens per second of whole models: ``moefast bench``.

- :mod:`.family` builds one family's models over one set of weights and puts its figures together.
- :mod:`.truth` is the reference in float32; :mod:`.subjects` runs a model and compares it with that.
- :mod:`.measure` verifies, chooses token counts (:mod:`.plan`) and times all subjects in turn.
- :mod:`.stats`, :mod:`.report`, :mod:`.plot`, :mod:`.machine`: from seconds to what is shown.
"""
