// Show the stored state of the page's widgets, with a bundle that is older than ipywidgets 8.
addEventListener("load", () =>
  require(["@jupyter-widgets/controls", "@jupyter-widgets/html-manager/dist/libembed-amd"],
    (controls, embed) => {
      // the styles that it lacks add only colours and fonts to the one it has
      for (const name of ["Checkbox", "HTML", "HTMLMath", "Label", "Text"])
        controls[`${name}StyleModel`] ??= controls.DescriptionStyleModel;
      if (window.MathJax) MathJax.Hub ??= {Queue() {}};  // it would call MathJax 2
      embed.renderWidgets();
    }));
