"""Formulas as MathML, which browsers draw by themselves: no script, no fonts from elsewhere."""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml


def _markup(node: nodes.Node, block: bool) -> str:
    text = re.sub(r"\\[bB]igg?[lr]?(?![a-zA-Z])", "", node.astext())  # browsers size brackets by themselves
    text = re.sub(r"\\dots(?![a-zA-Z])", r"\\ldots", text)
    return latex2mathml.tex2mathml(text, as_block=block)


def _inline(writer, node):
    writer.body.append(_markup(node, block=False))
    raise nodes.SkipNode


def _block(writer, node):
    writer.body.append(f'<div class="math" tabindex="0">{_markup(node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
