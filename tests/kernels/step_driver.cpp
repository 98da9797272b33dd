// Checks the kernels of a decoder's steps with a location term without torch, as kernel_driver.cpp checks the others:
// every buffer has exactly the size of its tensor, results are compared with plain loops in double precision, and three
// threads must agree with one in every bit.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "problem.h"

namespace {

using namespace additive_attn;
using std::int64_t;

std::uint64_t state = 1;
double uniform() {  // SplitMix64 (Steele, Lea, Flood 2014)
  std::uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return double((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1;
}

template <class T>
struct Array {
  std::unique_ptr<T[]> memory;  // not a vector: that may be larger than its size
  int64_t size;
  std::vector<int64_t> offset;

  Array(int64_t batch, int64_t each, bool garbage = false)
      : memory(new T[std::size_t(batch * each)]), size(batch * each) {
    for (int64_t n = 0; n < batch; ++n) offset.push_back(n * each);
    for (int64_t i = 0; i < size; ++i) memory[std::size_t(i)] = garbage ? T(12345.678) : T(uniform());
  }
  T& operator[](int64_t i) { return memory[std::size_t(i)]; }
  const T& operator[](int64_t i) const { return memory[std::size_t(i)]; }
  T* get() { return memory.get(); }
  Rows<const T> rows(int64_t row) const { return {memory.get(), offset.data(), row}; }
};

void alone(int64_t count, int64_t, const Body& body) {
  Tasks tasks(count);
  body(tasks);
}

void on_threads(int64_t count, int64_t, const Body& body) {
  Tasks tasks(count);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back([&] { body(tasks); });
  for (std::thread& thread : threads) thread.join();
}

int passed = 0, failed = 0;

template <class T>
void check(const char* what, const Array<T>& mine, const Array<T>& threaded, const std::vector<double>& exact) {
  double largest = 0, error = 0;
  bool same = true;
  for (int64_t i = 0; i < mine.size; ++i) {
    largest = std::max(largest, std::fabs(exact[std::size_t(i)]));
    error = std::max(error, std::fabs(double(mine[i]) - exact[std::size_t(i)]));
    same = same && mine[i] == threaded[i];
  }
  const bool right = same && error <= 500 * double(std::numeric_limits<T>::epsilon()) * (1 + largest);
  ++(right ? passed : failed);
  if (!right) std::printf("%s: error %g of %g%s\n", what, error, largest, same ? "" : ", threads differ");
}

using Sums = std::vector<double>;
Sums sums(int64_t n) { return Sums(std::size_t(n), 0.0); }

template <class T>
void features(int64_t B, int64_t C, int64_t keys, int64_t F, int64_t width) {
  const Array<T> inputs(B, C * keys), filter(F, C * width), grad(B, F * keys);
  Sums out = sums(B * F * keys), grad_inputs = sums(B * C * keys), grad_filters = sums(F * C * width);
  for (int64_t n = 0; n < B; ++n)
    for (int64_t f = 0; f < F; ++f)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t d = 0; d < width; ++d)
          for (int64_t j = 0; j < keys; ++j) {
            const int64_t i = j + d - width / 2, tap = (f * C + c) * width + d, at = (n * F + f) * keys + j;
            if (i < 0 || i >= keys) continue;
            out[std::size_t(at)] += double(filter[tap]) * inputs[(n * C + c) * keys + i];
            grad_inputs[std::size_t((n * C + c) * keys + i)] += double(filter[tap]) * grad[at];
            grad_filters[std::size_t(tap)] += double(grad[at]) * inputs[(n * C + c) * keys + i];
          }
  Array<T> o[2] = {{B, F * keys, true}, {B, F * keys, true}}, i[2] = {{B, C * keys, true}, {B, C * keys, true}};
  Array<T> w[2] = {{F, C * width, true}, {F, C * width, true}};
  for (int k = 0; k < 2; ++k) {
    LocationFeaturesBackward<T> p;
    p.batch = B, p.channels = C, p.keys = keys, p.filters = F, p.width = width;
    p.inputs = inputs.rows(keys), p.grad = grad.rows(keys), p.filter = filter.memory.get();
    p.out = o[k].get(), p.grad_inputs = i[k].get(), p.grad_filters = w[k].get();
    kernels().location_features(p, k ? ParallelFor(on_threads) : ParallelFor(alone));
    kernels().location_features_backward(p, k ? ParallelFor(on_threads) : ParallelFor(alone));
  }
  check("features", o[0], o[1], out);
  check("gradient of inputs", i[0], i[1], grad_inputs);
  check("gradient of filters", w[0], w[1], grad_filters);
}

// G and the gradients of one step, from upstream gradients of the weights alone.
template <class T>
void step(int64_t B, int64_t keys, int64_t H, int64_t F) {
  const Array<T> q(B, H), k(B, keys * H), w(B, H), x(B, F * keys), m(B, F * H), upstream(B, keys), v(B, keys);
  Array<int64_t> lengths(B, 1);
  for (int64_t n = 0; n < B; ++n) lengths[n] = keys - n * 3;
  Array<T> out[2] = {{B, 1, true}, {B, 1, true}}, lse[2] = {{B, 1, true}, {B, 1, true}};
  Array<T> weights[2] = {{B, keys, true}, {B, keys, true}}, g[2] = {{B, keys, true}, {B, keys, true}};
  Array<T> gq[2] = {{B, H, true}, {B, H, true}}, gw[2] = {{B, H, true}, {B, H, true}};
  Array<T> gx[2] = {{B, F * keys, true}, {B, F * keys, true}}, gm[2] = {{B, F * H, true}, {B, F * H, true}};
  Array<T> gk[2] = {{B, keys * H}, {B, keys * H}};
  for (int64_t i = 0; i < gk[0].size; ++i) gk[0][i] = gk[1][i] = T(2);
  const auto stored = [](const Rows<const T>& rows) { return StoredRows<T>{rows.data, rows.offset, rows.row}; };
  const auto fill = [&](Problem<T>& p) {
    p.batch = B, p.queries = 1, p.keys = keys, p.hidden = H, p.values = 1, p.threads = 1;
    p.query = q.rows(H), p.key = stored(k.rows(H)), p.weight = w.rows(H), p.value = stored(v.rows(1));
    p.location.features = F, p.location.x = x.rows(keys), p.location.weight = m.rows(H);
    p.lengths = {lengths.get(), lengths.offset.data(), 0};
    p.left = p.right = -1, p.scale = T(0.5);
  };
  for (int i = 0; i < 2; ++i) {
    const ParallelFor parallel = i ? ParallelFor(on_threads) : ParallelFor(alone);
    Forward<T> f{};
    fill(f);
    f.out = out[i].get(), f.lse = lse[i].get(), f.weights = weights[i].get();
    kernels().forward(f, parallel);
    StepBackward<T> b{};
    fill(b);
    b.weights = weights[i].rows(keys), b.grad_weights = upstream.rows(keys), b.grad_scores = g[i].get();
    b.grad_query = gq[i].get(), b.grad_key = gk[i].get(), b.grad_weight = gw[i].get();
    b.grad_location = gx[i].get(), b.grad_location_weight = gm[i].get();
    kernels().step_backward(b, parallel);
  }
  Sums P = sums(B * keys), G = P, dq = sums(B * H), dw = dq, dk(std::size_t(B * keys * H), 2.0);
  Sums dx = sums(B * F * keys), dm = sums(B * F * H);
  for (int64_t n = 0; n < B; ++n) {
    const auto t = [&](int64_t j, int64_t h) {
      double e = double(q[n * H + h]) + k[(n * keys + j) * H + h];
      for (int64_t f = 0; f < F; ++f) e += double(x[(n * F + f) * keys + j]) * m[(n * F + f) * H + h];
      return std::tanh(e);
    };
    double total = 0, delta = 0;
    for (int64_t j = 0; j < lengths[n]; ++j) {
      double score = 0;
      for (int64_t h = 0; h < H; ++h) score += 0.5 * w[n * H + h] * t(j, h);
      total += P[std::size_t(n * keys + j)] = std::exp(score);
    }
    for (int64_t j = 0; j < lengths[n]; ++j) {
      P[std::size_t(n * keys + j)] /= total;
      delta += P[std::size_t(n * keys + j)] * upstream[n * keys + j];
    }
    for (int64_t j = 0; j < lengths[n]; ++j) {
      const double slope = G[std::size_t(n * keys + j)] =
          P[std::size_t(n * keys + j)] * (upstream[n * keys + j] - delta);
      for (int64_t h = 0; h < H; ++h) {
        const double y = t(j, h), d = 0.5 * slope * w[n * H + h] * (1 - y * y);
        dq[std::size_t(n * H + h)] += d;
        dw[std::size_t(n * H + h)] += 0.5 * slope * y;
        dk[std::size_t((n * keys + j) * H + h)] += d;
        for (int64_t f = 0; f < F; ++f) {
          dx[std::size_t((n * F + f) * keys + j)] += d * m[(n * F + f) * H + h];
          dm[std::size_t((n * F + f) * H + h)] += d * x[(n * F + f) * keys + j];
        }
      }
    }
  }
  check("weights", weights[0], weights[1], P);
  check("G", g[0], g[1], G);
  check("dq", gq[0], gq[1], dq);
  check("dk", gk[0], gk[1], dk);
  check("dw", gw[0], gw[1], dw);
  check("dx", gx[0], gx[1], dx);
  check("dM", gm[0], gm[1], dm);
}

template <class T>
void all() {
  for (const int64_t keys : {4, 15, 16, 17, 33, 65, 130})
    for (const int64_t F : {1, 2, 3, 4, 5}) {
      for (const int64_t C : {1, 2, 3})
        for (const int64_t width : {1, 3, 7, 31, 65}) features<T>(2, C, keys, F, width);
      for (const int64_t H : {1, 16, 31, 33, 64, 72}) step<T>(2, keys, H, F);
    }
  features<T>(17, 1, 10, 2, 3);
  step<T>(1, 300, 20, 9);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0;
}
