// What the pages tell a browser beside NiceGUI's own messages: new data alone, to be added to what it holds.
window.ngd = {
  // A chart is mounted a moment after its element.
  change(id, edit) {
    const e = getElement(id);
    if (e?.chart) { edit(e.options); e.update_chart(); }
    else if (e) setTimeout(() => ngd.change(id, edit), 20);
  },
  // added: for each series where its new points begin, and the points.
  extend(id, added) {
    ngd.change(id, o => added.forEach(([start, points], i) => o.series[i].data.splice(start, Infinity, ...points)));
  },
  mark(ids, lines) {
    ids.forEach(id => ngd.change(id, o => o.series.at(-1).markLine.data.push(...lines)));
  },
  // columns: for each span of steps its label, then ages, intervals and refreshes of all statistics.
  columns(id, start, columns) {
    ngd.change(id, o => {
      const [cells, dots] = o.series.map(series => series.data), rows = o.yAxis.data.length;
      cells.splice(start * rows);
      dots.splice(0, Infinity, ...dots.filter(dot => dot[0] < start));
      o.xAxis.data.splice(start, Infinity, ...columns.map(column => column[0]));
      columns.forEach(([, ages, intervals, refreshes], i) => ages.forEach((age, y) => {
        cells.push([start + i, y, age, intervals[y], refreshes[y]]);
        if (refreshes[y] && intervals[y] > 1) dots.push(cells.at(-1));
        o.visualMap.max = Math.max(o.visualMap.max, age);
      }));
    });
  },
  // The end of the log, which stays in view unless the reader has scrolled up.
  log(id, text, lines) {
    const pre = document.getElementById(id);
    const follows = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 8;
    pre.textContent = (pre.textContent + text).split('\n').slice(-lines - 1).join('\n');
    if (follows) pre.scrollTop = pre.scrollHeight;
  },
  connect(ids) {
    import('nicegui-echart').then(m => {
      ids.forEach(id => { const e = getElement(id); if (e?.chart) e.chart.group = 'steps'; });
      m.echarts.connect('steps');
    });
  },
};
