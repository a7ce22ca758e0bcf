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
    ngd.when(id, e => {
      if (added.some(([start]) => !start)) ngd.dragging(e.chart);
      if (id === ngd.leader) ngd.follow();
    });
  },
  merge(id, options) {
    ngd.change(id, () => options);
  },
  mark(ids, lines) {
    ids.forEach(id => ngd.change(id, (_, options) => {
      options.series.at(-1).markLine.data.push(...lines);
      return {series: options.series.map(({markLine}) => markLine ? {markLine} : {})};
    }));
  },
  // columns: for each span of steps its label, then of all statistics the ages, intervals, refreshes and what decided
  // on them. shown: the one of these that colours the cells; all but ages are of any size, and take their logarithm.
  columns(id, start, columns, shown = 0) {
    ngd.change(id, (held, options) => {
      held.columns = [...(held.columns ?? []).slice(0, start), ...columns];
      const colour = value => shown ? value > 0 ? Math.log10(value) : '-' : value;
      const cells = held.columns.flatMap(([, ages, intervals, refreshes, ...why], x) => ages.map((age, y) =>
        [x, y, colour([ages, intervals, refreshes, ...why][shown]?.[y]), intervals[y], refreshes[y], age,
         ...why.map(values => values[y])]));
      const drawn = cells.map(cell => cell[2]).filter(value => value !== '-');
      const min = shown && drawn.length ? Math.min(...drawn) : 0, max = Math.max(...drawn, min + 1e-9, shown ? -9 : 1);
      const short = value => value < 1e4 ? +value.toPrecision(2) : value.toExponential(1);
      const said = value => shown ? short(10 ** value) : value;
      return {
        xAxis: {data: held.columns.map(column => column[0]), ...ngd.within(held.columns)},
        visualMap: {min, max, text: [`${said(max)} ${options.visualMap.text[0]}`.replace(/^1 steps/, '1 step'), said(min)]},
        series: [{data: cells}, {data: cells.filter(cell => cell[4] && cell[3] > 1)}],
      };
    });
  },
  // The columns that hold steps in view: a map of spans of steps has no zoom of its own, and follows the curves'.
  within(columns) {
    if (!ngd.window || !columns.length) return {min: null, max: null};
    const after = step => columns.findIndex(([label]) => +label.replaceAll(',', '') >= step), last = columns.length - 1;
    return {min: after(ngd.window[0]) < 0 ? last : after(ngd.window[0]), max: after(ngd.window[1]) < 0 ? last : after(ngd.window[1])};
  },
  // The end of the log stays in view unless the reader has scrolled up. at: the line to show instead.
  log(id, lines, most, whole, at) {
    const pre = document.getElementById(id);
    const follows = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 8;
    if (whole) pre.replaceChildren();
    pre.insertAdjacentHTML('beforeend', lines);
    while (pre.childElementCount > most) pre.firstElementChild.remove();
    if (at !== null) pre.scrollTop = pre.children[at].offsetTop - 60;
    else if (whole || follows) pre.scrollTop = pre.scrollHeight;
  },
  window: null,  // the first and the last step in view
  follows: false,
  // A finger scrolls the page; a mouse that is dragged zooms.
  dragging(chart) {
    if (matchMedia('(pointer: fine)').matches)
      chart.dispatchAction({type: 'takeGlobalCursor', key: 'dataZoomSelect', dataZoomSelectActive: true});
  },
  zoom(range) {
    const [startValue, endValue] = range ?? [];
    ngd.when(ngd.leader, e => e.chart.dispatchAction(
      range ? {type: 'dataZoom', startValue, endValue} : {type: 'dataZoom', start: 0, end: 100}));
  },
  zoomed(chart) {
    const {start, end, startValue, endValue} = chart.getOption().dataZoom.find(zoom => zoom.type === 'inside');
    ngd.window = start > 0 || end < 100 ? [Math.round(startValue), Math.round(endValue)] : null;
    for (const [id, {columns}] of Object.entries(ngd.held)) if (columns) ngd.change(id, () => ({xAxis: ngd.within(columns)}));
    clearTimeout(ngd.keeping);
    ngd.keeping = setTimeout(() => {
      ngd.keep({from: ngd.window?.[0], to: ngd.window?.[1]});
      if (!ngd.follows) emitEvent('zoomed', ngd.window);  // a view that follows gets each new step anyway
    }, 200);
  },
  follow() {
    const last = Math.max(...ngd.held[ngd.leader].series.map(points => points.at(-1)?.[0] ?? 0));
    if (ngd.follows && ngd.window && last > ngd.window[1])
      ngd.zoom([last - ngd.window[1] + ngd.window[0], last]);
  },
  // The view is kept in the page's address. values: by name, a text, several, or none.
  keep(values) {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(values)) {
      query.delete(name);
      [value ?? []].flat().forEach(one => query.append(name, one));
    }
    history.replaceState(history.state, '', location.pathname + (query.size ? `?${query}` : '') + location.hash);
  },
  // As a picture in the colours that are shown: outside the page the variables of its style mean nothing.
  picture(id, name) {
    const svg = getElement(id).chart.getDom().querySelector('svg');
    const style = getComputedStyle(document.body), colour = (_, name) => style.getPropertyValue(name).trim();
    const text = new XMLSerializer().serializeToString(svg).replace(/var\((--[\w-]+)\)/g, colour);
    const image = new Image(), canvas = document.createElement('canvas'), draw = canvas.getContext('2d');
    image.onload = () => {
      [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
      draw.fillStyle = style.getPropertyValue('--surface');
      draw.fillRect(0, 0, canvas.width, canvas.height);
      draw.drawImage(image, 0, 0, canvas.width, canvas.height);
      Object.assign(document.createElement('a'), {href: canvas.toDataURL(), download: `${name}.png`}).click();
    };
    image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text);
  },
  // Cursor and zoom are the same in all charts; the first one tells of the zoom.
  connect(ids, range) {
    import('nicegui-echart').then(m => {
      ids.forEach(id => ngd.when(id, e => {
        if (e.chart.group === 'steps') return;
        e.chart.group = 'steps';
        e.chart.getZr().on('dblclick', () => ngd.zoom(null));
      }));
      m.echarts.connect('steps');
      if (ngd.leader === ids[0]) return;
      ngd.leader = ids[0];
      ngd.when(ids[0], e => {
        e.chart.on('datazoom', () => ngd.zoomed(e.chart));
        if (range) ngd.zoom(range);
      });
    });
  },
};
