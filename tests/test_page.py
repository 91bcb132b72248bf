"""The report in headless Chromium, by `make test-browser`: layout, contrast, filters, print."""
import base64
import re
import shutil

import pytest
import report_contents

from srlm_jax.report import page

pytestmark = pytest.mark.slow

WIDTHS, SCHEMES = (390, 820, 1280), ('light', 'dark')
PAGES = ('one', 'several', 'empty')
ARGUMENTS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync',
             '--hide-scrollbars')
# [text, ratio] of every shown text whose contrast with its background is below 4.5 (WCAG 2.2,
# 1.4.3); texts of SVG have the background of their figure.
CONTRAST = r'''
const channels = text => {
  const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
  return [r, g, b, a];
};
const linear = x => { x /= 255; return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; };
const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const behind = element => {
  for (; element; element = element.parentElement) {
    const color = channels(getComputedStyle(element).backgroundColor);
    if (color[3] === 1) return color;
    if (color[3] !== 0) throw Error('a translucent background: ' + element.outerHTML);
  }
  throw Error('no background');
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const bad = [];
let count = 0;
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
  if (!text || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
  if (!element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const color = channels(element.closest('svg') ? style.fill : style.color);
  if (color[3] !== 1 || style.opacity !== '1') throw Error('translucent text: ' + text);
  const [a, b] = [luminance(color), luminance(behind(element))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  count += 1;
  if (ratio < 4.5) bad.push([text.slice(0, 40), ratio]);
}
return [count, bad];
'''
# Elements that reach over the right edge of the window, outside a box that scrolls.
OVERFLOW = '''
const edge = document.documentElement.clientWidth + 0.5;
return [...document.querySelectorAll('body *')].filter(element =>
  element.checkVisibility() && element.getBoundingClientRect().right > edge &&
  !element.closest('.scroll, nav, .text')).map(element => element.outerHTML.slice(0, 200));
'''
OPEN_ALL = "document.querySelectorAll('details').forEach(details => { details.open = true; })"


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  webdriver = pytest.importorskip('selenium.webdriver', reason='pip install selenium')
  programs = {name: shutil.which(name) for name in ('chromium', 'chromedriver')}
  if missing := [name for name, path in programs.items() if not path]:
    pytest.fail(f'{" and ".join(missing)} must be installed: Debian has the packages chromium and '
                f'chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = programs['chromium']
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  for argument in (*ARGUMENTS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}'):
    options.add_argument(argument)
  driver = webdriver.Chrome(
      options=options, service=webdriver.ChromeService(programs['chromedriver']))
  yield driver
  driver.quit()


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  """{name: file} of the pages."""
  folder = tmp_path_factory.mktemp('pages')
  found = {name: folder / f'{name}.html' for name in PAGES}
  for name, path in found.items():
    path.write_text(page.render(getattr(report_contents, name)()))
  return found


def show(browser, path, width=1280, scheme='light', script=True):
  """Loads a page, and clears the log of messages."""
  browser.get_log('browser')
  browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', dict(value=not script))
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
      width=width, height=900, deviceScaleFactor=1, mobile=False))
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
      features=[dict(name='prefers-color-scheme', value=scheme)]))
  browser.get(path.as_uri())


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', PAGES)
def test_a_page_fits_its_window_and_its_texts_have_contrast(browser, paths, name, width, scheme):
  show(browser, paths[name], width, scheme)
  background = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
  assert (int(re.search(r'\d+', background)[0]) > 128) == (scheme == 'light')
  for least in (20, 30 if name == 'empty' else 300):  # texts with all details closed, then open
    assert browser.execute_script('return innerWidth') == width
    assert browser.execute_script('return document.documentElement.scrollWidth') == width
    assert browser.execute_script(OVERFLOW) == []
    count, bad = browser.execute_script(CONTRAST)
    assert count > least and bad == []
    browser.execute_script(OPEN_ALL)
  assert browser.get_log('browser') == []


def test_hostile_texts_are_shown_as_text(browser, paths):
  show(browser, paths['one'])
  browser.execute_script(OPEN_ALL)
  shown = browser.execute_script(
      "return [...document.querySelectorAll('.text')].map(element => element.textContent)")
  for text in report_contents.HOSTILE.values():
    text = text.translate({0: '\ufffd', 27: '\ufffd'})
    assert any(text.strip() in found for found in shown), text
  assert browser.title == 'demo: self-rewarding training'
  assert browser.execute_script("return document.querySelectorAll('script, style').length") == 2
  assert browser.execute_script("return document.querySelectorAll('img, iframe, link').length") == 0
  assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_policy_refuses_other_scripts_styles_and_images(browser, paths, tmp_path):
  path = tmp_path / 'injected.html'
  path.write_text(paths['one'].read_text().replace('</header>', (
      '</header><script>document.title = "injected"</script><img src="x.png" onerror="a()">'
      '<p style="color: red" onclick="b()">x</p><style>body { color: red }</style>')))
  show(browser, path)
  messages = [entry['message'] for entry in browser.get_log('browser')]
  assert browser.title == 'demo: self-rewarding training'
  assert all('Content Security Policy' in message for message in messages)
  for kind in ('inline script', 'inline style', 'image', 'inline event handler'):
    assert any(kind in message for message in messages), kind


def shown(browser) -> list[str]:
  """The prompts of the samples that the filters show."""
  return browser.execute_script(
      "return [...document.querySelectorAll('details.sample')].filter(s => s.checkVisibility())"
      ".map(sample => sample.querySelector('.start').textContent)")


def fill(browser, name: str, value):
  """Sets a field of the filters as a user does."""
  browser.execute_script('''
    const field = document.querySelector('.filters').elements[arguments[0]];
    if (field.type === 'checkbox') field.checked = arguments[1]; else field.value = arguments[1];
    field.dispatchEvent(new Event('input', {bubbles: true}));''', name, value)


def test_search_and_filters(browser, paths):
  show(browser, paths['one'])
  everything = shown(browser)
  assert len(everything) == 2 * (len(report_contents.HOSTILE) + 1) + len(report_contents.HOSTILE)
  output = browser.find_element('css selector', 'output')
  assert output.text == f'{len(everything)} of {len(everything)} shown'
  box = browser.find_element('name', 'search')
  box.send_keys('EARRINGS wear')
  assert shown(browser) == ['Where do I wear earrings?'] * 2
  assert output.text == f'2 of {len(everything)} shown'
  fill(browser, 'pair', True)
  assert shown(browser) == []
  browser.find_element('css selector', '.filters button').click()
  browser.execute_async_script('setTimeout(arguments[0], 50)')
  assert shown(browser) == everything
  fill(browser, 'pair', True)
  assert len(shown(browser)) == 2 * len(report_contents.HOSTILE)
  fill(browser, 'pair', False)
  fill(browser, 'unparsed', True)
  assert 'Where do I wear earrings?' not in shown(browser) and shown(browser)
  fill(browser, 'unparsed', False)
  fill(browser, 'model', 'data-of-m3')
  assert len(shown(browser)) == len(report_contents.HOSTILE) + 1
  fill(browser, 'model', 'm2')
  assert [text[:15] for text in shown(browser)] == ['held-out prompt'] * len(
      report_contents.HOSTILE)
  fill(browser, 'model', '')
  fill(browser, 'low', '4')
  assert shown(browser) == ['Where do I wear earrings?'] * 2
  fill(browser, 'low', '3.2')
  fill(browser, 'high', '3.8')
  assert [text[:15] for text in shown(browser)] == ['held-out prompt'] * len(
      report_contents.HOSTILE)
  assert browser.get_log('browser') == []


def test_filters_of_several_runs_are_apart(browser, paths):
  show(browser, paths['several'])
  browser.execute_script(OPEN_ALL)
  everything = shown(browser)
  browser.find_element('name', 'search').send_keys('earrings')
  assert len(shown(browser)) == len(everything) / 2 + 2


def test_without_scripts_all_samples_can_be_read(browser, paths):
  show(browser, paths['one'], script=False)
  for selector, is_shown in (('.filters', False), ('details.sample', True)):
    elements = browser.find_elements('css selector', selector)
    assert elements and all(element.is_displayed() == is_shown for element in elements)
  sample = browser.find_element('css selector', 'details.sample')
  sample.find_element('css selector', 'summary').click()
  assert sample.find_element('css selector', '.candidate .text').is_displayed()
  browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', dict(value=False))


@pytest.mark.parametrize('name', PAGES)
def test_print_to_pdf(browser, paths, name):
  show(browser, paths[name], scheme='dark')
  pdf = base64.b64decode(browser.execute_cdp_cmd('Page.printToPDF', {})['data'])
  assert pdf.startswith(b'%PDF')
  assert 2 <= len(re.findall(rb'/Type\s*/Page\b', pdf)) <= 60
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(media='print'))
  assert browser.execute_script('return getComputedStyle(document.body).backgroundColor') == (
      'rgb(255, 255, 255)')
  hidden = browser.find_elements('css selector', 'nav, .filters, details.sample')
  assert not any(element.is_displayed() for element in hidden)
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(media=''))
