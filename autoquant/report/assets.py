"""The page that a report is put into: its frame, style and script."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<script>window.PlotlyConfig = {{MathJaxConfig: 'local'}};</script>
</head>
<body>
<main>
<h1>{heading}</h1>
<dl>{facts}</dl>
{body}
</main>
<script type="text/plain" id="library">{plotlyjs}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --ink: #1c1f23; --soft: #5a616b; --line: #e3e5e8; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a2a9b4; --line: #33383f; --page: #15181c; --card: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 4px; }
dl { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; }
dl div { background: var(--card); border-radius: 8px; padding: 6px 12px; max-width: 100%; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.headline { font-size: 1.05rem; margin: 16px 0 0; max-width: 75ch; }
.note { color: var(--soft); font-size: .88rem; margin: 0 0 12px; max-width: 90ch; }
.panels { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; min-width: 0; }
.wide { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 8px; font-size: .85rem; }
.chip i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 5px;
  vertical-align: -2px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: normal; min-width: 4.5em;
  vertical-align: bottom; }
td.text, th.text { text-align: left; white-space: normal; }
td.layers { min-width: 13em; }
tr.float td { color: var(--soft); }
th:first-child, td:first-child { min-width: 0; position: sticky; left: 0; background: var(--page); }
code { font-size: .95em; white-space: nowrap; user-select: all; background: var(--card);
  border-radius: 4px; padding: 2px 5px; }
h3 { font-size: 1rem; margin: 20px 0 4px; }
ul { margin: 0; padding-left: 1.2em; max-width: 90ch; overflow-wrap: anywhere; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--soft); }
tr[data-trial] { cursor: pointer; }
tr[data-trial]:hover td, tr.selected td { background: var(--card); }
tr.selected td:first-child { font-weight: 700; }
.command { display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0; }
.command code { white-space: normal; overflow-wrap: anywhere; }
button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 1px 10px; cursor: pointer; }
#strip { display: grid; grid-auto-flow: column; gap: 2px; width: max-content; max-width: none;
  grid-template-rows: 28px 56px 56px; font-size: .75rem; }
#strip .label { color: var(--soft); padding-right: 8px; align-self: end; white-space: nowrap;
  position: sticky; left: 0; background: var(--page); z-index: 1; }
#strip button { padding: 0; border: 0; border-radius: 3px; font-size: .75rem; line-height: 1; }
#strip .bar { display: flex; align-items: flex-end; background: var(--card); }
#strip .bar i { display: block; width: 100%; min-height: 1px; }
#strip .bytes i { background: #3b8fd1; }
#strip .time i { background: #d55e00; }
#strip .sensitivity i { background: #009e73; }
#strip .on { outline: 2px solid var(--ink); outline-offset: -1px; }
.print { --ink: #1c1f23; --soft: #5a616b; --line: #e3e5e8; --page: #ffffff; --card: #f6f7f9; }
@media print {
  body { font-size: 11px; }
  main { padding: 0; max-width: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .wide { overflow: visible; }
  figure, tr, #chosen { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  table { font-size: 8px; }
  th, td { padding: 2px 4px; }
  #copy, td code, th.export { display: none; }
}
"""

SCRIPT = """
(function () {
  var plots = PLOTS;
  var chosen = CHOSEN;
  var options = { responsive: true, displayModeBar: false };
  var members = {}, selected = null, rings = {};
  chosen.members.forEach(function (member) { members[member.trial] = member; });
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }
  function byId(id) { return document.getElementById(id); }
  function add(parent, tag, kind, text) {
    var element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  }
  function place(name, trial) {
    var front = plots[name].data.filter(function (t) {
      return t.name === 'front' && t.customdata;
    })[0];
    var i = front ? front.customdata.indexOf(trial) : -1;
    return i < 0 ? { x: [], y: [] } : { x: [front.x[i]], y: [front.y[i]] };
  }
  Object.keys(plots).forEach(function (name) {
    if (!plots[name].data.some(function (t) { return t.name === 'front' && t.customdata; })) return;
    rings[name] = {
      type: 'scatter', mode: 'markers', x: [], y: [], hoverinfo: 'skip', showlegend: false,
      marker: { size: 17, symbol: 'circle-open', line: { width: 2.5 } }
    };
    plots[name].data.push(rings[name]);
  });
  function draw() {
    var ink = colour('--ink'), line = colour('--line'), card = colour('--card');
    Object.keys(plots).forEach(function (name) {
      var layout = plots[name].layout;
      layout.font.color = ink;
      if (matchMedia('(pointer: coarse)').matches) layout.dragmode = false;
      [layout.xaxis, layout.yaxis].forEach(function (axis) {
        axis.gridcolor = axis.linecolor = line;
      });
      layout.hoverlabel = { align: 'left', bgcolor: card, bordercolor: line, font: { color: ink } };
      if (rings[name]) {
        rings[name].marker.color = ink;
        Object.assign(rings[name], place(name, selected));
      }
      layout.datarevision = (layout.datarevision || 0) + 1;
      Plotly.react(name, plots[name].data, layout, options);
    });
  }
  var most = [0, 0, 0];
  var rows = ['weight bytes', 'time', 'sensitivity'], kinds = ['bytes', 'time', 'sensitivity'];
  function costs(member) {
    return chosen.layers.map(function (layer, i) {
      return (layer.costs[member.layers[i][1]] || [null, null]).concat([layer.sensitivity]);
    });
  }
  chosen.members.forEach(function (member) {
    costs(member).forEach(function (pair) {
      most = most.map(function (value, i) { return Math.max(value, pair[i] || 0); });
    });
  });
  function bytes(value) {
    return value >= 1e6 ? (value / 1e6).toPrecision(3) + ' MB'
      : value >= 1e3 ? (value / 1e3).toPrecision(3) + ' kB' : Math.round(value) + ' B';
  }
  function largest(pairs, column) {
    var sum = 0, at = 0;
    pairs.forEach(function (pair, i) {
      sum += pair[column] || 0;
      if ((pair[column] || 0) > (pairs[at][column] || 0)) at = i;
    });
    if (!sum) return '';
    return chosen.layers[at].name + ' has ' + Math.round(100 * pairs[at][column] / sum) + ' %';
  }
  function show(trial) {
    var member = members[trial], strip = byId('strip'), note = byId('strip-note');
    if (!member || !strip) return;
    byId('chosen-title').textContent =
      (trial === selected ? 'Selected: trial ' : 'Under the mouse: trial ') + trial;
    byId('chosen-command').textContent = member.command;
    var facts = byId('chosen-facts');
    facts.textContent = '';
    member.facts.forEach(function (fact) {
      var box = add(facts, 'div');
      add(box, 'dt', '', fact[0]);
      add(box, 'dd', '', fact[1]);
    });
    strip.textContent = '';
    var pairs = costs(member), wide = chosen.layers.length <= 60;
    var columns = [0, 1, 2].filter(function (column) { return most[column] > 0; });
    var size = chosen.layers.length <= 24 ? 40 : wide ? 26 : chosen.layers.length <= 200 ? 12 : 5;
    strip.style.gridAutoColumns = 'max-content';
    strip.style.gridTemplateRows = ['28px'].concat(columns.map(function () { return '56px'; }))
      .join(' ');
    add(strip, 'span', 'label', 'bits');
    columns.forEach(function (c) { add(strip, 'span', 'label', rows[c]); });
    var parts = [largest(pairs, 0), largest(pairs, 1), largest(pairs, 2)];
    var summary = (parts[0] ? 'Of the weight bytes ' + parts[0] + '. ' : '')
      + (parts[1] ? 'Of the time of kernels ' + parts[1]
        + '; changes of precision between layers come on top. ' : '')
      + (parts[2] ? 'Of the divergence that compression causes ' + parts[2] + '.' : '');
    note.textContent = summary;
    chosen.layers.forEach(function (layer, i) {
      var bits = member.layers[i][0], pair = pairs[i];
      var words = layer.name + ': ' + member.layers[i][2]
        + (pair[0] === null ? '' : ', ' + bytes(pair[0]))
        + (pair[1] === null ? '' : ', ' + pair[1].toPrecision(3) + ' ms')
        + (pair[2] === null ? '' : ', ' + (100 * pair[2]).toPrecision(2) + ' % of the divergence');
      var cell = add(strip, 'button', '', wide ? (bits === 32 ? 'f' : String(bits)) : '');
      cell.type = 'button';
      cell.title = words;
      cell.setAttribute('aria-label', words);
      cell.style.cssText = 'width:' + size + 'px;background:' + chosen.colours[bits]
        + ';color:' + (bits < 6 ? '#fff' : '#111');
      var bars = columns.map(function (column) {
        var bar = add(strip, 'span', 'bar ' + kinds[column]);
        bar.title = words;
        add(bar, 'i').style.height = 100 * (pair[column] || 0) / most[column] + '%';
        return bar;
      });
      [cell].concat(bars).forEach(function (element) {
        ['mouseenter', 'focus', 'click'].forEach(function (event) {
          element.addEventListener(event, function () {
            Array.prototype.forEach.call(strip.querySelectorAll('.on'), function (other) {
              other.classList.remove('on');
            });
            cell.classList.add('on');
            note.textContent = words + '. ' + summary;
          });
        });
      });
    });
  }
  function mark(trial) {
    show(trial);
    Array.prototype.forEach.call(document.querySelectorAll('tr[data-trial]'), function (row) {
      row.classList.toggle('selected', row.dataset.trial === String(trial));
    });
  }
  function select(trial) {
    if (!members[trial]) return;
    selected = trial;
    mark(trial);
    if (!window.Plotly) return;
    Object.keys(rings).forEach(function (name) {
      Object.assign(rings[name], place(name, trial));
      Plotly.restyle(name, { x: [rings[name].x], y: [rings[name].y] },
        [plots[name].data.length - 1]);
    });
  }
  function trialOf(name, event) {
    var point = event.points[0];
    if (name === 'bits') return chosen.members[Math.round(point.y)].trial;
    return members[point.customdata] ? point.customdata : null;
  }
  Array.prototype.forEach.call(document.querySelectorAll('tr[data-trial]'), function (row) {
    function choose(event) {
      if (event.type === 'keydown' && event.key !== 'Enter') return;
      select(Number(row.dataset.trial));
    }
    row.addEventListener('click', choose);
    row.addEventListener('keydown', choose);
  });
  if (byId('copy')) byId('copy').addEventListener('click', function () {
    var text = byId('chosen-command').textContent;
    var button = byId('copy');
    if (!navigator.clipboard) {
      getSelection().selectAllChildren(byId('chosen-command'));
      return;
    }
    navigator.clipboard.writeText(text).then(function () {
      button.textContent = 'Copied';
      setTimeout(function () { button.textContent = 'Copy'; }, 1500);
    });
  });
  function start() {
    var library = document.createElement('script');
    library.textContent = byId('library').textContent;
    document.head.appendChild(library);
    draw();
    Object.keys(plots).forEach(function (name) {
      var plot = byId(name);
      if (!(rings[name] || name === 'bits') || !chosen.members.length) return;
      plot.on('plotly_hover', function (event) {
        var trial = trialOf(name, event);
        if (trial !== null) show(trial);
      });
      plot.on('plotly_unhover', function () { show(selected); });
      plot.on('plotly_click', function (event) {
        var trial = trialOf(name, event);
        if (trial !== null) select(trial);
      });
    });
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
    addEventListener('beforeprint', function () {
      document.documentElement.classList.add('print');
      draw();
    });
    addEventListener('afterprint', function () {
      document.documentElement.classList.remove('print');
      draw();
    });
  }
  if (chosen.members.length) {
    selected = chosen.first;
    mark(selected);
  }
  requestAnimationFrame(function () { setTimeout(start); }); // the page is read meanwhile
})();
"""
