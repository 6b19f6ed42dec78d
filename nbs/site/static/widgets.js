// Show the stored state of the page's widgets.
require(["@jupyter-widgets/html-manager/dist/libembed-amd"], embed => embed.renderWidgets());
