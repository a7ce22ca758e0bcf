// What the pages tell a browser beside NiceGUI's own messages: new data alone, to be added to what is held here.
window.ngd = {
  held: {},  // by chart; not in its element, for Vue would watch each point
  // A chart is mounted a moment after its element, and a new element a moment after the page is told of it.
  when(id, act, tries = 500) {
    const e = getElement(id);
    if (e?.chart) act(e);
    else if (tries) setTimeout(() => ngd.when(id, act, tries - 1), 20);
  },
  // edit: changes what is held and returns what ECharts is to merge.
  change(id, edit) {
    ngd.when(id, e => e.chart.setOption(edit(ngd.held[id] ??= {}, e.options)));
  },
  // added: for each series where its new points begin, and the points.
  extend(id, added) {
    ngd.change(id, held => {
      held.series = added.map(([start, points], i) => [...(held.series?.[i] ?? []).slice(0, start), ...points]);
      return {series: held.series.map(data => ({data}))};
    });
  },
  mark(ids, lines) {
    ids.forEach(id => ngd.change(id, (_, options) => {
      options.series.at(-1).markLine.data.push(...lines);
      return {series: options.series.map(({markLine}) => markLine ? {markLine} : {})};
    }));
  },
  // columns: for each span of steps its label, then ages, intervals and refreshes of all statistics.
  columns(id, start, columns) {
    ngd.change(id, (held, options) => {
      held.columns = [...(held.columns ?? []).slice(0, start), ...columns];
      const cells = held.columns.flatMap(([, ages, intervals, refreshes], x) =>
        ages.map((age, y) => [x, y, age, intervals[y], refreshes[y]]));
      return {
        xAxis: {data: held.columns.map(column => column[0])},
        visualMap: {max: cells.reduce((most, cell) => Math.max(most, cell[2]), 1)},
        series: [{data: cells}, {data: cells.filter(cell => cell[4] && cell[3] > 1)}],
      };
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
      ids.forEach(id => ngd.when(id, e => { e.chart.group = 'steps'; }));
      m.echarts.connect('steps');
    });
  },
};
