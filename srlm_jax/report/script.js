'use strict';
// Search and filters of the samples. Without this script all samples are shown.
{
  const enable = group => {
    const form = group.querySelector('.filters');
    const samples = [...group.querySelectorAll('details.sample')];
    const texts = samples.map(sample => sample.textContent.toLowerCase());

    const isShown = (sample, text) => {
      const { search, model, pair, unparsed, low, high } = form.elements;
      const { models, scores } = sample.dataset;
      const inRange = score => !(score < parseFloat(low.value)) &&
        !(score > parseFloat(high.value));
      return search.value.toLowerCase().split(/\s+/).every(word => text.includes(word)) &&
        (!model.value || models.split(' ').includes(model.value)) &&
        (!pair.checked || 'pair' in sample.dataset) &&
        (!unparsed.checked || 'unparsed' in sample.dataset) &&
        ((low.value === '' && high.value === '') ||
         scores.split(' ').filter(Boolean).map(Number).some(inRange));
    };
    const filter = () => {
      samples.forEach((sample, i) => { sample.hidden = !isShown(sample, texts[i]); });
      const count = samples.filter(sample => !sample.hidden).length;
      form.querySelector('output').value = `${count} of ${samples.length} shown`;
    };
    form.hidden = false;
    form.addEventListener('input', filter);
    form.addEventListener('reset', () => setTimeout(filter));
    form.addEventListener('submit', event => event.preventDefault());
    filter();
  };
  document.querySelectorAll('.filterable').forEach(enable);
}
