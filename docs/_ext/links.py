"""Links that notebooks and docstrings need no markup for: `lmc.name` to its reference, **term** to the glossary."""

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform


class Linked(SphinxPostTransform):
    default_priority = 5  # before references are resolved

    def run(self, **_):
        if self.env.docname == "glossary":
            return
        known = self.env.domains["py"].objects
        terms = {term.lower() for term in self.env.domains["std"]._terms}
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext().split("(")[0]
            if name in known:
                self._link(node, "py", "obj", name)
        for node in list(self.document.findall(nodes.strong)):
            if node.astext().lower() in terms:
                self._link(node, "std", "term", node.astext().lower())

    def _link(self, node, domain, kind, target):
        if isinstance(node.parent, nodes.reference | addnodes.pending_xref):
            return
        options = {"refdomain": domain, "reftype": kind, "reftarget": target, "refexplicit": True, "refwarn": True}
        link = addnodes.pending_xref("", refdoc=self.env.docname, **options)
        node.replace_self(link)
        link += node


def resolve(app, env, node, content):
    """Docstrings write the package's own names without their path."""
    target = f"lmc.{node.get('reftarget')}"
    python = env.domains["py"]
    if node.get("refdomain") == "py" and target in python.objects:
        return python.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)
    return None


def setup(app):
    app.connect("missing-reference", resolve)
    app.add_post_transform(Linked)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
