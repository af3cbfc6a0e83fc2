"""One pair of networks connected as well as can be, within a time: starts, refinement over the whole group, judgement."""
