/* Necklace's operators for MXNet 1.9, registered through its lib_api.h and loaded by mx.library.load.
 *
 * Attributes, shapes and gradients are those of the graph language in symbol/; the kernels of necklace.h do the work.
 * Tensors are float32, because the graphs compute losses and predictions in float32 at every precision. The data of the
 * losses may be float64.
 *
 * N images, A anchors per cell, C foreground classes, H x W cells, K anchors of all levels, P cells of all levels,
 * T boxes kept per level. A shape with a dimension of 0, or without dimensions, is unknown.
 */
#include <mxnet/lib_api.h>

#include <algorithm>
#include <cmath>

#include "attributes.h"
#include "kernels.h"
#include "pointwise.h"

namespace {

using namespace nkmx;
using mxnet::ext::MXTensor;
using mxnet::ext::OpResource;
using Tensors = std::vector<MXTensor>;
using Shape = std::vector<unsigned>;
using Shapes = std::vector<Shape>;
using Types = std::vector<int>;

/* MXNet passes -1, an unknown dimension, as the largest unsigned number. */
bool is_known(const Shape& shape) {
  return !shape.empty() && std::none_of(shape.begin(), shape.end(), [](unsigned d) { return d == 0 || d == ~0u; });
}

std::string text_of(const Shape& shape) {
  std::string text;
  for (unsigned d : shape) text += (text.empty() ? "" : ", ") + std::to_string(d);
  return "(" + text + ")";
}

/* Set an unknown shape to the expected one; refuse a known shape that differs. */
void settle(Shape& shape, const Shape& expected, const char* name) {
  if (is_known(shape) && shape != expected) {
    refuse(std::string(name) + " should be " + text_of(expected) + ", but it is " + text_of(shape));
  }
  shape = expected;
}

/* Scratch memory of one call, divided into arrays. MXNet allocates a single block: a second request invalidates it. */
class Workspace {
 public:
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  Workspace(const OpResource& resource, const Place& place, int64_t bytes) {
    if (bytes > INT32_MAX) refuse("more than 2 GiB of work memory, which MXNet cannot allocate: use smaller batches");
    const int size = static_cast<int>(bytes);
    next_ = static_cast<char*>(place.gpu ? resource.alloc_gpu(size) : resource.alloc_cpu(size));
  }

  template <class T>
  T* take(int64_t count) {
    char* array = next_;
    next_ += padded(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(array);
  }

 private:
  char* next_;
};

Place place_of(const MXTensor& tensor, const OpResource& resource) {
  const bool gpu = tensor.ctx.dev_type == "gpu";
  return {gpu, gpu ? resource.get_cuda_stream() : nullptr};
}

intptr_t where_of(const Place& place) {
  return place.gpu ? reinterpret_cast<intptr_t>(place.stream) : cpu_threads();
}

const float* values(MXTensor& tensor) { return tensor.data<float>(); }

/* Return the factors (N) of the images' losses that normalise the loss, in scale_bytes(N) of the workspace. */
double* write_scale(const Attributes& attrs, const char* otherwise, double factor, MXTensor& label, int64_t N,
                    const Place& place, Workspace& work) {
  const std::string kind = attrs.text("normalization", otherwise);
  double* count = work.take<double>(1);
  double* scale = work.take<double>(N);
  if (kind == "valid") count_foreground(place, values(label), label.size(), count);
  if (kind == "batch") factor /= static_cast<double>(std::max<int64_t>(1, N));
  for_each(place, N, ImageScale{kind == "valid" ? count : nullptr, factor, scale});
  return scale;
}

int64_t scale_bytes(int64_t N) { return Workspace::padded(8) + Workspace::padded(8 * N); }

void require_normalization(const Attributes& attrs, const char* otherwise) {
  const std::string kind = attrs.text("normalization", otherwise);
  if (kind != "null" && kind != "batch" && kind != "valid") attrs.refuse_value("normalization", "null, batch or valid");
}

/* Return the code of a tensor's type in necklace.h. */
int32_t dtype_of(const MXTensor& tensor) {
  return tensor.dtype == mxnet::ext::kFloat64 ? NK_FLOAT64 : NK_FLOAT32;
}

void zero(const Place& place, MXTensor& tensor) {
  nk::with_dtype<float, double>(
      dtype_of(tensor), [&]<class T>() { for_each(place, tensor.size(), Zero<T>{tensor.data<T>()}); });
}

/* Operators are structs of static functions. The inputs of `backward` are the output gradients, inputs and outputs. */

struct FocalLoss {
  static constexpr bool kTakesDouble = true;
  // data (N, K, C), label (N, K) -> loss of every logit (N, K, C)
  static constexpr int kInputs = 2;
  static constexpr int kOutputs = 1;

  static void check(const Attributes& attrs) {
    attrs.require_known({"alpha", "gamma", "grad_scale", "normalization", "out_grad", "workspace"});
    require_normalization(attrs, "null");
    attrs.boolean("out_grad", false);
    attrs.number("alpha", 0);
    attrs.number("grad_scale", 0);
    if (!(attrs.number("gamma", 2) >= 0)) attrs.refuse_value("gamma", "a number from 0 on");
  }

  static void shape(const Attributes&, Shapes& in, Shapes& out) {
    if (!is_known(in[0])) return;
    if (in[0].size() != 3) refuse("data must be (N, K, C), got " + text_of(in[0]));
    settle(in[1], {in[0][0], in[0][1]}, "label");
    out[0] = in[0];
  }

  static void forward(const Attributes& attrs, Tensors& in, Tensors& out, const OpResource& resource) {
    const int64_t N = in[0].shape[0];
    const Place place = place_of(in[0], resource);
    Workspace work(resource, place, scale_bytes(N));
    const double* scale = write_scale(attrs, "null", attrs.number("grad_scale", 1), in[1], N, place, work);
    const double gamma = attrs.number("gamma", 2);
    const double alpha = attrs.number("alpha", 0.25);
    nk::with_dtype<float, double>(dtype_of(in[0]), [&]<class T>() {
      nk::with_bool(gamma == 2, [&]<bool squared>() {
        const FocalTerms<T, squared> terms{
            in[0].data<T>(), values(in[1]), scale, out[0].data<T>(), in[0].shape[1], in[0].shape[2], alpha,
            nk::focal_term<T, squared>(gamma)};
        for_each(place, in[0].size(), terms);
      });
    });
  }

  /* The operator is a loss at the head of a graph: the gradient of its output is ignored, unless out_grad is set. */
  static void backward(const Attributes& attrs, Tensors& in, Tensors& out, const OpResource& resource) {
    MXTensor& logit = in[1];
    MXTensor& label = in[2];
    const int64_t N = logit.shape[0], K = logit.shape[1], C = logit.shape[2];
    const Place place = place_of(logit, resource);
    const Kernels& kernel = kernels(place.gpu);
    const int64_t bytes = kernel.focal_loss_workspace(N, 1, K, C);
    Workspace work(resource, place, scale_bytes(N) + Workspace::padded(8) + Workspace::padded(bytes));
    const double* scale = write_scale(attrs, "null", attrs.number("grad_scale", 1), label, N, place, work);
    double* loss = work.take<double>(1);  // unused: the output is the loss of every logit
    for_each(place, 1, Zero<double>{loss});
    const int64_t stride[4] = {K * C, 0, 1, C};  // [n, a, c, p] with a single anchor
    kernel.check(kernel.focal_loss(logit.data_ptr, out[0].data_ptr, dtype_of(logit), N, 1, K, C, stride, stride,
                                   values(label), K, scale, attrs.number("alpha", 0.25), attrs.number("gamma", 2), loss,
                                   work.take<char>(bytes), where_of(place)));
    if (attrs.boolean("out_grad", false)) {
      nk::with_dtype<float, double>(dtype_of(logit), [&]<class T>() {
        for_each(place, N * K * C, Multiply<T>{in[0].data<T>(), out[0].data<T>()});
      });
    }
    zero(place, out[1]);
  }
};

struct BBoxNorm {
  static constexpr bool kTakesDouble = true;
  // data (N, 4A, P), label (N, K) -> data
  static constexpr int kInputs = 2;
  static constexpr int kOutputs = 1;

  static void check(const Attributes& attrs) {
    attrs.require_known({"normalization"});
    require_normalization(attrs, "valid");
  }

  static void shape(const Attributes&, Shapes& in, Shapes& out) {
    if (!is_known(in[0])) return;
    if (in[0].size() != 3 || in[0][1] % 4) refuse("data must be (N, 4A, P), got " + text_of(in[0]));
    settle(in[1], {in[0][0], in[0][1] / 4 * in[0][2]}, "label");
    out[0] = in[0];
  }

  static void forward(const Attributes&, Tensors& in, Tensors& out, const OpResource& resource) {
    nk::with_dtype<float, double>(dtype_of(in[0]), [&]<class T>() {
      for_each(place_of(in[0], resource), in[0].size(), Copy<T>{in[0].data<T>(), out[0].data<T>()});
    });
  }

  /* Pass the gradient of the output on, normalised. */
  static void backward(const Attributes& attrs, Tensors& in, Tensors& out, const OpResource& resource) {
    const int64_t N = in[1].shape[0];
    const Place place = place_of(in[1], resource);
    Workspace work(resource, place, scale_bytes(N));
    const double* scale = write_scale(attrs, "valid", 1, in[2], N, place, work);
    nk::with_dtype<float, double>(dtype_of(in[0]), [&]<class T>() {
      for_each(place, in[0].size(), Scale<T>{in[0].data<T>(), scale, out[0].data<T>()});
    });
    zero(place, out[1]);
  }
};

/* The base of operators whose gradient is zero. */
struct NoGradient {
  static constexpr bool kTakesDouble = false;

  static void backward(const Attributes&, Tensors& in, Tensors& out, const OpResource& resource) {
    for (MXTensor& grad : out) zero(place_of(in[0], resource), grad);
  }
};

struct GenAnchor : NoGradient {
  // cls_prob (N, A*C, H, W) -> anchors (H*W*A, 4)
  static constexpr int kInputs = 1;
  static constexpr int kOutputs = 1;

  static void check(const Attributes& attrs) {
    attrs.require_known({"scales", "ratios", "feature_stride"});
    const size_t count = scales(attrs).size() * ratios(attrs).size();
    if (count < 1 || count > kMaxAnchors) {
      refuse("scales times ratios: expected 1 to " + std::to_string(kMaxAnchors) + ", got " + std::to_string(count));
    }
    attrs.integer("feature_stride", 16);
  }

  static void shape(const Attributes& attrs, Shapes& in, Shapes& out) {
    if (!is_known(in[0])) return;
    if (in[0].size() != 4) refuse("cls_prob must be (N, A*C, H, W), got " + text_of(in[0]));
    const size_t count = scales(attrs).size() * ratios(attrs).size();
    out[0] = {static_cast<unsigned>(in[0][2] * in[0][3] * count), 4};
  }

  static void forward(const Attributes& attrs, Tensors& in, Tensors& out, const OpResource& resource) {
    const int64_t stride = attrs.integer("feature_stride", 16);
    GridAnchors grid{{}, 0, in[0].shape[3], stride, out[0].data<float>()};
    const double side = static_cast<double>(stride), center = 0.5 * (side - 1);
    for (double ratio : ratios(attrs)) {
      const double width = std::nearbyint(std::sqrt(side * side / ratio));
      const double height = std::nearbyint(width * ratio);
      for (double scale : scales(attrs)) {
        const double half_w = 0.5 * (width * scale - 1);
        const double half_h = 0.5 * (height * scale - 1);
        const double box[4] = {center - half_w, center - half_h, center + half_w, center + half_h};
        std::copy(box, box + 4, grid.base[grid.A]);
        ++grid.A;
      }
    }
    for_each(place_of(in[0], resource), out[0].size(), grid);
  }

 private:
  static std::vector<double> scales(const Attributes& attrs) { return attrs.numbers("scales", {4, 8, 16, 32}); }
  static std::vector<double> ratios(const Attributes& attrs) { return attrs.numbers("ratios", {0.5, 1, 2}); }
};

struct GenProposalRetina : NoGradient {
  // cls_prob (N, A*C, H, W), bbox_pred (N, 4A, H, W), im_info (N, 3), anchors (H*W*A, 4)
  // -> boxes (N, T, 4) and scores (N, T, C + 1)
  static constexpr int kInputs = 4;
  static constexpr int kOutputs = 2;

  static void check(const Attributes& attrs) {
    attrs.require_known({"num_anchors", "rpn_pre_nms_top_n", "rpn_min_size", "feature_stride", "thresh", "anchor_mean",
                         "anchor_std", "iou_loss", "output_one_hot", "batch_wise_anchor", "workspace"});
    if (!attrs.has("num_anchors")) refuse("attribute 'num_anchors' is missing; expected an integer");
    if (attrs.integer("num_anchors", 1) < 1) attrs.refuse_value("num_anchors", "at least 1");
    if (attrs.integer("rpn_pre_nms_top_n", 6000) < 1) attrs.refuse_value("rpn_pre_nms_top_n", "at least 1");
    if (!(attrs.number("thresh", 0) >= 0)) attrs.refuse_value("thresh", "a number from 0 on");
    for (double mean : attrs.numbers("anchor_mean", {})) {
      if (mean != 0) attrs.refuse_value("anchor_mean", "zeros");
    }
    for (double std : attrs.numbers("anchor_std", {})) {
      if (std != 1) attrs.refuse_value("anchor_std", "ones");
    }
    if (attrs.boolean("iou_loss", false)) attrs.refuse_value("iou_loss", "False");
    if (!attrs.boolean("output_one_hot", true)) attrs.refuse_value("output_one_hot", "True");
    if (attrs.boolean("batch_wise_anchor", false)) attrs.refuse_value("batch_wise_anchor", "False");
  }

  static void shape(const Attributes& attrs, Shapes& in, Shapes& out) {
    if (!is_known(in[0])) return;
    const unsigned A = static_cast<unsigned>(attrs.integer("num_anchors", 1));
    const unsigned T = static_cast<unsigned>(attrs.integer("rpn_pre_nms_top_n", 6000));
    if (in[0].size() != 4 || in[0][1] % A) {
      refuse("cls_prob must be (N, A*C, H, W) with A = " + std::to_string(A) + ", got " + text_of(in[0]));
    }
    const unsigned N = in[0][0], H = in[0][2], W = in[0][3];
    if (static_cast<uint64_t>(in[0][1]) * H * W >> 32) refuse("cls_prob has 2^32 probabilities per image or more");
    settle(in[1], {N, 4 * A, H, W}, "bbox_pred");
    settle(in[2], {N, 3}, "im_info");
    settle(in[3], {H * W * A, 4}, "anchors");
    out[0] = {N, T, 4};
    out[1] = {N, T, in[0][1] / A + 1};
  }

  static void forward(const Attributes& attrs, Tensors& in, Tensors& out, const OpResource& resource) {
    const int64_t A = attrs.integer("num_anchors", 1), T = out[0].shape[1];
    const int64_t N = in[0].shape[0], C = in[0].shape[1] / A, P = in[0].shape[2] * in[0].shape[3];
    const Place place = place_of(in[0], resource);
    const Kernels& kernel = kernels(place.gpu);
    const int64_t bytes = kernel.retina_decode_workspace(N, A, C, P, T), rows = N * T;
    Workspace work(resource, place, Workspace::padded(4 * rows) + Workspace::padded(8 * rows) + bytes);
    float* score = work.take<float>(rows);
    int64_t* cls = work.take<int64_t>(rows);
    const int64_t prob_stride[3] = {A * C * P, P, 1}, delta_stride[3] = {4 * A * P, P, 1};
    kernel.check(kernel.retina_decode(values(in[0]), NK_FLOAT32, prob_stride, values(in[1]), NK_FLOAT32, delta_stride,
                                      values(in[3]), values(in[2]), N, A, C, P, T,
                                      static_cast<float>(attrs.number("thresh", 0)), out[0].data<float>(), score, cls,
                                      work.take<char>(bytes), where_of(place)));
    for_each(place, out[1].size(), OneHot{score, cls, C + 1, out[1].data<float>()});
  }
};

/* Run body and return success or failure, as MXNet's callbacks do, with the message of its exception. */
template <class Body>
mxnet::ext::MXReturnValue guarded(Body body) {
  try {
    body();
    return mxnet::ext::MX_SUCCESS;
  } catch (const std::exception& error) {
    MX_ERROR_MSG << error.what();
    return mxnet::ext::MX_FAIL;
  }
}

template <class Op>
mxnet::ext::CustomOp& define(mxnet::ext::CustomOp& op) {
  op.setParseAttrs(+[](const Attrs& attrs, int* inputs, int* outputs) {
    *inputs = Op::kInputs;
    *outputs = Op::kOutputs;
    return guarded([&] { Op::check(Attributes(attrs)); });
  });
  op.setInferType(+[](const Attrs&, Types* in, Types* out) {
    return guarded([&] {
      const bool is_double = Op::kTakesDouble && in->front() == mxnet::ext::kFloat64;
      for (size_t i = 0; i < in->size(); ++i) {
        const int expected = is_double && i == 0 ? mxnet::ext::kFloat64 : mxnet::ext::kFloat32;
        if ((*in)[i] != -1 && (*in)[i] != expected) refuse("expected float32 inputs: cast them before");
        (*in)[i] = expected;
      }
      std::fill(out->begin(), out->end(), in->front());
    });
  });
  op.setInferShape(+[](const Attrs& attrs, Shapes* in, Shapes* out) {
    return guarded([&] { Op::shape(Attributes(attrs), *in, *out); });
  });
  const auto forward = +[](const Attrs& attrs, Tensors* in, Tensors* out, const OpResource& resource) {
    return guarded([&] { Op::forward(Attributes(attrs), *in, *out, resource); });
  };
  const auto backward = +[](const Attrs& attrs, Tensors* in, Tensors* out, const OpResource& resource) {
    return guarded([&] { Op::backward(Attributes(attrs), *in, *out, resource); });
  };
  op.setForward(forward, "cpu").setBackward(backward, "cpu");
#ifdef NK_WITH_CUDA
  op.setForward(forward, "gpu").setBackward(backward, "gpu");
#endif
  return op;
}

/* Register an operator; the equivalent of MXNet's macro REGISTER_OP for operators that are structs. */
template <class Op>
mxnet::ext::CustomOp& registered(const char* name) {
  return define<Op>(mxnet::ext::Registry<mxnet::ext::CustomOp>::get()->add(name));
}

[[maybe_unused]] const auto* const focal_loss = &registered<FocalLoss>("_contrib_FocalLoss");
[[maybe_unused]] const auto* const bbox_norm = &registered<BBoxNorm>("_contrib_BBoxNorm");
[[maybe_unused]] const auto* const gen_anchor = &registered<GenAnchor>("_contrib_GenAnchor");
[[maybe_unused]] const auto* const gen_proposal = &registered<GenProposalRetina>("_contrib_GenProposalRetina");

}  // namespace

NK_EXPORT mxnet::ext::MXReturnValue initialize(int version) {
  if (version / 100 == 109) return mxnet::ext::MX_SUCCESS;
  MX_ERROR_MSG << "these operators were built for MXNet 1.9, this is version " << version;
  return mxnet::ext::MX_FAIL;
}
